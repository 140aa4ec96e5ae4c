"""What bad input gets: every mistake in a sentence that says what to change, all at once, before a worker starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.settings import Settings
from cluster.storage import dataset_key, open_storage
from jobs.admission import admit, examples_of
from jobs.spec import JobSpec, SpecError
from tests.s3_server import S3Server
from tests.tiny_models import byte_tokenizer, save_tiny_model

ROWS = [{"prompt": f"item {i}: ", "completion": f"code {i}"} for i in range(10)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def settings(tmp_path: Path, model: Path) -> Settings:
    return Settings(home=tmp_path / "home", base_models={"tiny": str(model)})


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def spec(tmp_path: Path, **options: Any) -> JobSpec:
    dataset = write(tmp_path / "rows.jsonl", ROWS)
    return JobSpec.model_validate({"base_model": "tiny", "dataset": dataset, "adapter": "a"} | options)


def problems(tmp_path: Path, settings: Settings, **options: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        admit(spec(tmp_path, **options), settings, 2)
    return caught.value.problems


def test_an_admitted_job_has_its_rows_in_storage_and_a_summary(tmp_path: Path, settings: Settings) -> None:
    validation = write(tmp_path / "validation.jsonl", ROWS[:3])
    admitted = admit(spec(tmp_path, validation=validation), settings, 2)
    storage = open_storage(settings.storage_url)
    assert storage.get(dataset_key(admitted.dataset_sha)) == (tmp_path / "rows.jsonl").read_bytes()
    assert admitted.validation_sha is not None
    assert storage.get(dataset_key(admitted.validation_sha)) == Path(validation).read_bytes()
    assert admitted.summary[0] == "10 rows of prompt/completion, 10 examples"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lora": {"target_modules": ["q_porj"]}}, "'q_porj' matches no module. Choose from down_proj, gate_proj"),
        ({"lora": {"target_modules": ["lm_head"]}}, "the output head, which shares its weight with the embedding"),
        ({"base_model": "/no/such/model"}, "base_model: base model /no/such/model: there is no such file or directory"),
        ({"base_model": "no-such/model"}, "it is no alias of LORA_BASE_MODELS, no local path, and the hub did not"),
        ({"dataset": "/no/such/rows.jsonl"}, "dataset: /no/such/rows.jsonl is not a file that can be read here"),
        ({"validation": "/no/such/rows.jsonl"}, "validation: /no/such/rows.jsonl is not a file"),
        ({"num_workers": 3}, "num_workers is 3, but this cluster has room for 2; lower it"),
        ({"train": {"max_seq_len": 4}}, "dataset: "),
    ],
)
def test_one_mistake_gets_one_sentence(
    tmp_path: Path, settings: Settings, options: dict[str, Any], sentence: str
) -> None:
    (problem,) = problems(tmp_path, settings, **options)
    assert sentence in problem


def test_all_mistakes_come_at_once(tmp_path: Path, settings: Settings) -> None:
    broken = write(tmp_path / "broken.jsonl", [*ROWS, {"prompt": "no completion"}])
    found = problems(
        tmp_path,
        settings.model_copy(update={"storage_url": "ftp://somewhere"}),
        dataset=broken,
        lora={"target_modules": ["nothing"]},
        num_workers=9,
    )
    assert [problem.split()[0] for problem in found] == ["num_workers", "storage:", "lora.target_modules:", "dataset:"]
    assert "line 11" in found[-1]


def test_a_storage_url_without_credentials_says_which_to_set(
    tmp_path: Path, settings: Settings, s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    bucket = settings.model_copy(update={"storage_url": f"s3://{s3_environment.bucket}/x"})
    (problem,) = problems(tmp_path, bucket)
    assert "AWS_ACCESS_KEY_ID" in problem


def test_mistakes_in_rows_on_both_sides_of_a_fraction_come_together(tmp_path: Path, settings: Settings) -> None:
    rows = write(tmp_path / "bad.jsonl", [{"prompt": f"{i}"} for i in range(8)])
    (problem,) = problems(tmp_path, settings, dataset=rows, validation=0.25)
    assert all(f"line {number}:" in problem for number in range(1, 9))


def test_nothing_is_stored_of_a_refused_job(tmp_path: Path, settings: Settings) -> None:
    problems(tmp_path, settings, num_workers=3)
    assert open_storage(settings.storage_url).list() == []


def test_rows_and_base_may_lie_in_a_bucket(tmp_path: Path, settings: Settings, model: Path, s3_url: str) -> None:
    bucket = open_storage(s3_url)
    bucket.put("rows.jsonl", Path(write(tmp_path / "rows.jsonl", ROWS)))
    for file in model.iterdir():
        bucket.put(f"model/{file.name}", file)
    asked = spec(tmp_path, dataset=f"{s3_url}/rows.jsonl", base_model=f"{s3_url}/model")
    here = admit(spec(tmp_path), settings, 2)
    assert admit(asked, settings, 2).dataset_sha == here.dataset_sha
    fetched = {path.name for path in (settings.cache_dir / "fetched").rglob("*") if path.is_file()}
    assert "config.json" in fetched
    assert "model.safetensors" not in fetched  # weights are for workers


def test_a_fraction_holds_out_rows_that_are_not_trained(tmp_path: Path) -> None:
    train, held_out = examples_of(spec(tmp_path, validation=0.2), tmp_path / "rows.jsonl", None, byte_tokenizer())
    assert held_out is not None
    assert (len(train.examples), len(held_out.examples)) == (8, 2)
    assert not {tuple(e.ids) for e in train.examples} & {tuple(e.ids) for e in held_out.examples}
