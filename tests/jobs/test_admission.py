"""What bad input gets: every mistake in a sentence that says what to change, all at once, before a worker starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.registry import AdapterRegistry
from cluster.settings import Settings
from cluster.storage.base import StorageCorrupt
from cluster.storage.directory import open_storage
from cluster.storage.keys import dataset_key, init_adapter_key
from jobs.admission import admit
from jobs.initial_adapter import load_initial
from jobs.job import SessionKey
from jobs.session.loader import JobReader
from jobs.session.messages import Assignment
from jobs.spec import JobSpec, SpecError
from jobs.store.jobs import JobQueue
from jobs.stored_examples import examples_of
from lora_core.adapters.targets import AdaptableModules
from lora_core.models.base import describe_base, load_base
from lora_core.models.files import chat_template_hash, load_tokenizer
from lora_core.training.engine import TrainEngine
from tests.support.models import random_adapter
from tests.support.rows import chat, clock_says
from tests.support.s3_server import S3Server
from tests.support.tiny_models import DATED_TEMPLATE, byte_tokenizer, save_tiny_model, with_more_tokens, write_adapter

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


@pytest.mark.parametrize(("lora", "path"), [({}, "llama"), ({"r": 2, "init_lora_weights": "pissa"}, "hooks")])
def test_an_admitted_job_knows_its_path(lora: dict[str, Any], path: str, tmp_path: Path, settings: Settings) -> None:
    """Whose sessions are others' than those of jobs that take another one."""
    asked = spec(tmp_path, lora=lora)
    admitted = admit(asked, settings, 2)
    assert admitted.forward_path == path
    queue = JobQueue(settings.database_url)
    job, _ = queue.submit(
        asked, cluster="c", base="tiny", dataset_sha=admitted.dataset_sha, code_version="v", forward_path=path
    )
    assert job.session_key == SessionKey("tiny", "auto", 1, path)


def test_an_admitted_job_has_its_rows_in_storage_and_a_summary(tmp_path: Path, settings: Settings) -> None:
    validation = write(tmp_path / "validation.jsonl", ROWS[:3])
    admitted = admit(spec(tmp_path, validation=validation), settings, 2)
    storage = open_storage(settings.storage_url)
    assert storage.get(dataset_key(admitted.dataset_sha)) == (tmp_path / "rows.jsonl").read_bytes()
    assert admitted.validation_sha is not None
    assert storage.get(dataset_key(admitted.validation_sha)) == Path(validation).read_bytes()
    assert admitted.summary[0] == "10 rows of prompt/completion, 10 examples"


@pytest.mark.parametrize("name", ["my:model", "my model", "m@1", ".hidden", "m|1", "模型"])
def test_a_base_whose_adapters_nobody_could_ask_for_is_refused_without_an_alias(
    tmp_path: Path, settings: Settings, model: Path, name: str
) -> None:
    folder = tmp_path / name
    folder.symlink_to(model)
    (problem,) = problems(tmp_path, settings, base_model=str(folder))
    assert problem.startswith(f"base_model: nobody could ask for {name}:a, as a base's name has letters")
    named = settings.model_copy(update={"base_models": {"my-base": str(folder)}})
    admit(spec(tmp_path, base_model=named.locate_base(str(folder))), named, 2)


def test_what_rows_become_is_fixed_when_a_job_is_submitted(
    tmp_path: Path, settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks read it whatever the day and the template are by then, and need neither the rows nor a tokenizer."""
    template = tmp_path / "dated"
    shutil.copytree(model, template)
    (template / "chat_template.jinja").write_text(DATED_TEMPLATE)
    dataset = write(tmp_path / "chats.jsonl", [chat(f"Hi {i}", "Yo.") for i in range(8)])
    asked = spec(tmp_path, base_model=str(template), dataset=dataset, validation=0.25)
    clock_says(monkeypatch, "31 Dec")
    admitted, again = (admit(asked, settings, 2) for _ in range(2))
    clock_says(monkeypatch, "01 Jan")
    later = admit(asked, settings, 2)
    assert admitted.examples_sha == again.examples_sha != later.examples_sha
    assert admitted.dataset_sha == later.dataset_sha

    storage = open_storage(settings.storage_url)
    base = load_base(str(model), precision="fp32", cache_dir=tmp_path / "cache")  # whose template is another by now
    reader = JobReader(storage, TrainEngine(base), rank=0)
    storage.delete(dataset_key(admitted.dataset_sha))
    base.tokenizer = None  # type: ignore[assignment]
    _, prepared, tokenizer = reader._read_now(Assignment("job", 1, asked.canonical_json(), admitted.examples_sha))
    text = byte_tokenizer().decode(prepared.job.examples[0].ids)
    assert text == "31 Dec<|im_start|>user\nHi 0<|im_end|>\n<|im_start|>assistant\nYo.<|im_end|>"
    assert (len(prepared.job.examples), len(prepared.job.validation)) == (6, 2)
    assert tokenizer == chat_template_hash(load_tokenizer(template))
    with pytest.raises(ValueError, match="submit it again"):
        reader._read_now(Assignment("of an earlier version", 1, asked.canonical_json()))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lora": {"target_modules": ["q_porj"]}}, "'q_porj' matches no module. Choose from down_proj, gate_proj"),
        ({"lora": {"target_modules": ["lm_head"]}}, "the output head, which shares its weight with the embedding"),
        ({"base_model": "/no/such/model"}, "base_model: base model /no/such/model: there is no such file or directory"),
        ({"base_model": "~no-user/x"}, "base_model: base model ~no-user/x: there is no such file or directory"),
        ({"base_model": "no-such/model"}, "it is no alias of LORA_BASE_MODELS, no local path, and the hub did not"),
        ({"dataset": "/no/such/rows.jsonl"}, "dataset: /no/such/rows.jsonl is not a file that can be read here"),
        ({"validation": "/no/such/rows.jsonl"}, "validation: /no/such/rows.jsonl is not a file"),
        ({"num_workers": 3}, "num_workers is 3, but this cluster has room for 2; lower it"),
        ({"train": {"max_seq_len": 4}}, "dataset: "),
        ({"precision": "fp8", "lora": {"init_lora_weights": "pissa"}}, "lora.init_lora_weights is not possible on a"),
        ({"dataset": "LONG"}, "train.max_seq_len: the longest row has 4,1"),
        ({"validation": "LONG"}, "this base model 4,096 positions: set max_seq_len to 4096 or less"),
    ],
)
def test_one_mistake_gets_one_sentence(
    tmp_path: Path, settings: Settings, options: dict[str, Any], sentence: str
) -> None:
    long = write(tmp_path / "long.jsonl", [{"prompt": "long ", "completion": "word " * 820}])
    given = {"train": {"max_seq_len": 8192}} if "LONG" in options.values() else {}
    given |= {option: long if value == "LONG" else value for option, value in options.items()}
    (problem,) = problems(tmp_path, settings, **given)
    assert sentence in problem


def test_a_base_that_cannot_be_quantised_and_an_adapter_on_its_head_come_together(
    tmp_path: Path, settings: Settings
) -> None:
    model = save_tiny_model("gemma2", tmp_path / "gemma2")
    found = problems(
        tmp_path,
        settings,
        base_model=str(model),
        precision="nf4",
        lora={"target_modules": ["q_proj", "lm_head"]},
    )
    assert found == [
        "lora.target_modules: lm_head is not possible on a base in nf4: leave it out, or use bf16",
        "precision: nf4 is there for Llama, Mistral, Qwen2 and Qwen3 alone, and its family is gemma2; use bf16",
    ]


def test_a_token_that_the_base_has_no_row_for_is_named_with_its_line(tmp_path: Path, settings: Settings) -> None:
    model = save_tiny_model("llama", tmp_path / "more")
    with_more_tokens(byte_tokenizer()).save_pretrained(model)
    rows = write(tmp_path / "more.jsonl", [*ROWS, {"prompt": "what is <|more|>? ", "completion": "a token"}])
    (problem,) = problems(tmp_path, settings, base_model=str(model), dataset=rows)
    assert problem.startswith(
        "dataset: line 11: the token `<|more|>` has the id 264, and the base model's embedding 264"
    )


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


def test_a_base_in_a_bucket_is_judged_by_the_names_of_its_files(
    tmp_path: Path, settings: Settings, model: Path, adapter: Path, s3_url: str
) -> None:
    bucket = open_storage(s3_url)
    bucket.put("unfinished/config.json", model / "config.json")
    bucket.put("unfinished/adapter_config.json", adapter / "adapter_config.json")
    (problem,) = problems(tmp_path, settings, base_model=f"{s3_url}/unfinished")
    assert "it holds no *.safetensors with the model's weights, only those of an adapter" in problem
    bucket.put("adapter/adapter_config.json", adapter / "adapter_config.json")
    (problem,) = problems(tmp_path, settings, base_model=f"{s3_url}/adapter")
    assert "this is a PEFT adapter; give its base (tiny) as base_model" in problem


def test_a_fraction_holds_out_rows_that_are_not_trained(tmp_path: Path, model: Path) -> None:
    asked = spec(tmp_path, validation=0.2)
    train, held_out = examples_of(asked, tmp_path / "rows.jsonl", None, *describe_base(str(model), tmp_path))
    assert held_out is not None
    assert (len(train.examples), len(held_out.examples)) == (8, 2)
    assert not {tuple(e.ids) for e in train.examples} & {tuple(e.ids) for e in held_out.examples}


# --- the adapter to start from ---------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path, model: Path) -> Path:
    """A PEFT directory of rank 4 on the base."""
    adaptable = AdaptableModules(describe_base(str(model), tmp_path)[0])
    return write_adapter(random_adapter(adaptable, seed=1), adaptable, tmp_path / "adapter")


def test_the_first_adapter_may_lie_anywhere_and_is_copied(
    tmp_path: Path, settings: Settings, adapter: Path, model: Path, s3_url: str
) -> None:
    """A published version, a directory and a bucket give the same digest, from which ranks load the same weights."""
    storage = open_storage(settings.storage_url)
    files = {file.name: file.read_bytes() for file in adapter.iterdir()}
    registry = AdapterRegistry(storage, settings.tenant)
    version = registry.publish("tiny", "triage", files, {}).version
    registry.publish("tiny", "triage", files | {"adapter_config.json": files["adapter_config.json"] + b" "}, {})
    for name, content in files.items():
        open_storage(s3_url).put(f"x/{name}", content)
    sources = [str(adapter), f"{s3_url}/x", f"tiny:triage@{version}", "tiny:triage"]
    shas = [
        admit(spec(tmp_path, init_adapter=source, lora={"r": 4}), settings, 2).init_adapter_sha for source in sources
    ]
    assert shas[0] == shas[1] == shas[2] != shas[3]  # the latest is another version
    assert shas[0] is not None
    for file in files:
        (adapter / file).unlink()
    adaptable = AdaptableModules(describe_base(str(model), tmp_path)[0])
    loaded = load_initial(storage, shas[0], adaptable, "any")
    assert all(torch.equal(loaded.a[name], a) for name, a in random_adapter(adaptable, seed=1).a.items())
    assert admit(spec(tmp_path), settings, 2).init_adapter_sha is None


def test_a_first_adapter_of_dora_and_a_head_is_checked_without_the_bases_weights(
    tmp_path: Path, settings: Settings
) -> None:
    """PEFT saves the weight of an adapted head along, which the ranks compare with the base's."""
    model, folder = save_tiny_model("gemma2", tmp_path / "gemma2"), tmp_path / "dora"
    options: dict[str, Any] = {"r": 4, "use_dora": True, "target_modules": ["q_proj", "lm_head"]}
    base = AutoModelForCausalLM.from_pretrained(model)
    peft.get_peft_model(base, peft.LoraConfig(**options)).save_pretrained(str(folder), save_embedding_layers=True)
    asked: dict[str, Any] = {"base_model": str(model), "init_adapter": str(folder)}
    assert admit(spec(tmp_path, **asked, lora=options), settings, 2).init_adapter_sha is not None
    (problem,) = problems(tmp_path, settings, **asked, lora=options | {"use_dora": False})
    assert problem == "init_adapter: it was trained with DoRA, so set use_dora"


def test_a_published_first_adapter_stays_with_the_weights_that_it_was_trained_on(
    tmp_path: Path, settings: Settings, adapter: Path, model: Path
) -> None:
    """Its base's name may have come to mean others; what was not published here says nothing of its base."""
    storage = open_storage(settings.storage_url)
    files = {file.name: file.read_bytes() for file in adapter.iterdir() if file.name.startswith("adapter_")}
    AdapterRegistry(storage, settings.tenant).publish("tiny", "old", files, {"base_fingerprint": "a" * 64})
    adaptable = AdaptableModules(describe_base(str(model), tmp_path)[0])
    AdapterRegistry(storage, "public").publish("tiny", "shared", files, {})
    directory, published, public = (
        admit(spec(tmp_path, init_adapter=source, lora={"r": 4}), settings, 2).init_adapter_sha
        for source in (str(adapter), "tiny:old", "tiny:shared@1")
    )
    assert directory == published == public and published is not None
    assert load_initial(storage, published, adaptable, "a" * 64).a
    with pytest.raises(ValueError, match=r"trained on other weights \(a{12}\) than base_model names now \(b{12}\)"):
        load_initial(storage, published, adaptable, "b" * 64)


def test_a_first_adapter_whose_copy_was_changed_is_not_loaded(
    tmp_path: Path, settings: Settings, adapter: Path, model: Path
) -> None:
    sha = admit(spec(tmp_path, init_adapter=str(adapter), lora={"r": 4}), settings, 2).init_adapter_sha
    assert sha is not None
    storage = open_storage(settings.storage_url)
    key = init_adapter_key(sha, "adapter_config.json")
    storage.put(key, storage.get(key) + b" ")
    with pytest.raises(StorageCorrupt, match="is damaged; submit the job again"):
        load_initial(storage, sha, AdaptableModules(describe_base(str(model), tmp_path)[0]), "any")


@pytest.mark.parametrize(
    ("source", "lora", "sentence"),
    [
        (
            "/no/such",
            {},
            "init_adapter: /no/such holds no adapter_config.json; give a PEFT adapter's directory or s3://",
        ),
        ("tiny:nothing", {}, "init_adapter: there is no adapter tiny:nothing; published: nothing yet"),
        ("tiny:", {}, "init_adapter: there is no adapter tiny:; published: nothing yet"),
        ("other:triage", {}, "init_adapter: other:triage belongs to the base other, and this job's is tiny; give"),
        ("ftp://x/y", {}, "init_adapter: the storage URL 'ftp://x/y' must be file:///absolute/path or s3://"),
        (None, {"r": 8}, "init_adapter: its rank is 4 in model.layers.0.self_attn.q_proj, and this job's is 8"),
        (None, {"r": 4, "init_lora_weights": "pissa"}, "lora.init_lora_weights: leave it out, since init_adapter says"),
    ],
)
def test_a_first_adapter_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, settings: Settings, adapter: Path, source: str | None, lora: dict[str, Any], sentence: str
) -> None:
    (problem,) = problems(tmp_path, settings, init_adapter=source or str(adapter), lora=lora)
    assert problem.startswith(sentence)


def test_a_damaged_first_adapter_and_all_of_lora_come_at_once(
    tmp_path: Path, settings: Settings, adapter: Path
) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    found = problems(
        tmp_path,
        settings,
        init_adapter=str(adapter),
        lora={"target_modules": ["x"], "rank_pattern": {"y": 2}, "alpha_pattern": {"z": 2}, "layers_to_transform": [7]},
    )
    assert [problem.split(":")[0] for problem in found] == [
        "lora.target_modules",
        "lora.layers_to_transform",
        "lora.rank_pattern",
        "lora.alpha_pattern",
        "init_adapter",
    ]
    assert "adapter: not a readable PEFT adapter" in found[-1]
