"""Every method of OpenAI's client that this API has, by the version of the client that is imported here.

    python -m tests.support.client_calls URL KEY ROWS JOB      a file of rows, and a job that has published

What is answered is valid as the client's own types, strictly. Imports nothing of ours.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import openai


def valid(thing: Any) -> Any:
    type(thing).model_validate(thing.to_dict(), strict=True)
    return thing


def files(client: openai.OpenAI, rows: Path) -> str:
    file = valid(client.files.create(file=rows, purpose="fine-tune"))
    valid(client.files.wait_for_processing(file.id))
    assert valid(client.files.retrieve(file.id)).id in [valid(one).id for one in client.files.list(limit=1)]
    assert client.files.content(file.id).read() == rows.read_bytes()
    upload = client.uploads.upload_file_chunked(
        file=rows, mime_type="application/jsonl", purpose="fine-tune", part_size=100
    )
    assert valid(upload).status == "completed" and upload.file is not None
    assert valid(client.files.delete(upload.file.id)).deleted
    begun = valid(client.uploads.create(bytes=1, filename="a.jsonl", mime_type="x", purpose="fine-tune"))
    assert valid(client.uploads.cancel(begun.id)).status == "cancelled"
    return str(file.id)


def jobs(client: openai.OpenAI, file: str, trained: str) -> str:
    api = client.fine_tuning.jobs
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": "auto"}}}
    job = valid(
        api.create(
            model="tiny",
            training_file=file,
            suffix="called",
            method=method,
            seed=1,
            metadata={"by": openai.__version__},
            extra_body={"lora": {"r": 2}},
        )
    )
    assert [valid(one).id for one in api.list(metadata={"by": openai.__version__})] == [job.id]
    assert [api.pause(job.id).status, api.resume(job.id).status] == ["paused", "queued"]
    assert valid(api.cancel(job.id)).status == "cancelled"
    done = valid(api.retrieve(trained))
    assert len([valid(event) for event in api.list_events(trained, limit=2)]) > 5
    checkpoints = [valid(checkpoint) for checkpoint in api.checkpoints.list(trained, limit=1)]
    assert valid(client.models.delete(checkpoints[0].fine_tuned_model_checkpoint)).deleted
    assert client.files.content(valid(client.files.retrieve(done.result_files[0])).id).text.startswith("step,")
    return str(done.fine_tuned_model)


def answers(client: openai.OpenAI, model: str) -> None:
    assert valid(client.models.retrieve(model)).id == model
    assert "tiny" in [valid(one).id for one in client.models.list()]
    messages: Any = [{"role": "user", "content": "Hi"}]
    assert valid(client.chat.completions.create(model=model, messages=messages)).choices[0].message.content == "hello"
    assert valid(client.completions.create(model=model, prompt="Hi")).choices[0].text == "hello"
    usage: Any = {"include_usage": True}
    chunks = [
        valid(chunk)
        for chunk in client.chat.completions.create(model=model, messages=messages, stream=True, stream_options=usage)
    ]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "hello"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 5
    assert "".join(one.choices[0].text for one in client.completions.create(model=model, prompt="Hi", stream=True))


def errors(client: openai.OpenAI) -> None:
    for ask, kind, code in (
        (lambda: client.models.retrieve("none"), openai.NotFoundError, "model_not_found"),
        (lambda: client.files.retrieve("file-none"), openai.NotFoundError, "file_not_found"),
        (lambda: client.fine_tuning.jobs.retrieve("job-none"), openai.NotFoundError, "fine_tune_not_found"),
        (lambda: client.completions.create(model="tiny", prompt="x", n=0), openai.BadRequestError, "invalid_value"),
        (lambda: client.with_options(api_key="x").models.list(), openai.AuthenticationError, "invalid_api_key"),
    ):
        try:
            ask()
        except openai.APIStatusError as error:
            assert (type(error), error.code) == (kind, code) and error.request_id != "", error
        else:
            raise AssertionError(code)


def main() -> None:
    url, key, rows, job = sys.argv[1:]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    model = jobs(client, files(client, Path(rows)), job)
    answers(client, model)
    errors(client)
    print(openai.__version__)


if __name__ == "__main__":
    main()
