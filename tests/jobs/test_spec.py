"""Job specs: everything wrong at once, in words that say what to change; and what counts as the same content."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.spec import JobSpec, SpecError, load_spec

GOOD = {"base_model": "smollm2-135m", "dataset": "/data/rows.jsonl", "adapter": "triage"}


def problems(**changes: object) -> list[str]:
    """What is wrong with a good spec after some changes; None takes an option away."""
    values = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    with pytest.raises(SpecError) as caught:
        load_spec(json.dumps(values))
    return caught.value.problems


def test_a_full_spec_reads_the_same_from_yaml_json_and_its_own_canonical_form(tmp_path: Path) -> None:
    text = """
base_model: smollm2-135m
dataset: /data/rows.jsonl     # a comment
validation: 0.1
adapter: triage
lora: {r: 8, lora_alpha: 32, target_modules: [q_proj, v_proj], use_rslora: true}
train:
  epochs: 2
  learning_rate: 2e-4
precision: fp32
num_workers: 2
priority: -1
"""
    spec = load_spec(text)
    assert spec.lora.target_modules == ["q_proj", "v_proj"] and spec.lora.use_rslora
    assert (spec.train.epochs, spec.train.learning_rate, spec.train.batch_size) == (2, 2e-4, 8)
    assert (spec.validation, spec.precision, spec.num_workers, spec.priority) == (0.1, "fp32", 2, -1)
    file = tmp_path / "job.yaml"
    file.write_text(text)
    assert load_spec(file) == load_spec(str(file)) == spec
    assert JobSpec.model_validate_json(spec.canonical_json()) == spec
    tabs = json.dumps(json.loads(spec.canonical_json()), indent="\t")
    assert load_spec(tabs).canonical_json() == spec.canonical_json()


def test_every_problem_is_reported_at_once_and_none_twice() -> None:
    found = problems(
        base_model=3,
        dataset=...,
        adapter="Foo Bar",
        validation=0.5,
        precision="fp16",
        num_workers=0,
        priority=True,
        num_wrokers=2,
        lora={"r": "16", "lora_alhpa": 3, "target_modules": 3},
        train={"epochs": 0, "lr_scheduler": "cos", "train_on": "completions"},
    )
    assert found == [
        "base_model must be text, not 3",
        "dataset is missing: every job needs it",
        "validation must be a fraction of the rows above 0 and below 0.5, or the path of a second dataset, not 0.5",
        "adapter must be 1 to 64 lower-case letters, digits, '.', '_' or '-' and start with a letter or digit, "
        "not the text 'Foo Bar'",
        "lora.r must be a whole number, not the text '16'",
        "lora.target_modules must be text or a list, not 3",
        "unknown key 'lora.lora_alhpa': did you mean 'lora_alpha'?",
        "train.epochs must be at least 1, not 0",
        "train.lr_scheduler must be one of 'constant', 'linear' or 'cosine', not the text 'cos'",
        "train.train_on must be one of 'completion' or 'all', not the text 'completions'",
        "precision must be one of 'auto', 'fp32', 'bf16', 'fp8' or 'nf4', not the text 'fp16'",
        "num_workers must be at least 1, not 0",
        "priority must be a whole number, not true",
        "unknown key 'num_wrokers': did you mean 'num_workers'?",
    ]


def test_options_of_evaluation_are_refused_without_held_out_rows() -> None:
    wanted = {"eval_steps": 10, "load_best_model_at_end": True, "early_stopping_patience": 3}
    assert problems(train=wanted, priority=True) == [
        "train has eval_steps and load_best_model_at_end and early_stopping_patience but there are no validation rows"
        " to judge by: give validation, a fraction such as 0.1 or the path of a second dataset",
        "priority must be a whole number, not true",
    ]
    (alone,) = problems(train={"early_stopping_patience": 3})
    assert alone.startswith("train has early_stopping_patience but")
    (wrong,) = problems(train=wanted, validation=0.7)
    assert wrong.startswith("validation must be a fraction")
    for validation in (0.1, "/held.jsonl"):
        load_spec(json.dumps(GOOD | {"validation": validation, "train": wanted}))
    load_spec(json.dumps(GOOD | {"train": {"load_best_model_at_end": False}}))
    assert problems(train=wanted | {"early_stopping_patience": 0, "eval_steps": 1.5}, validation=0.1) == [
        "train.eval_steps must be a whole number, not 1.5",
        "train.early_stopping_patience must be at least 1, not 0",
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora": {"lora_alhpa": 1}}, "unknown key 'lora.lora_alhpa': did you mean 'lora_alpha'?"),
        ({"train": {"batchsize": 1}}, "unknown key 'train.batchsize': did you mean 'batch_size'?"),
        ({"datset": "x"}, "unknown key 'datset': did you mean 'dataset'?"),
        ({"learning_rate": 1e-4}, "unknown key 'learning_rate': 'learning_rate' belongs under 'train'"),
        ({"lora": {"epochs": 1}}, "unknown key 'lora.epochs': 'epochs' belongs under 'train'"),
        ({"train": {"priority": 1}}, "unknown key 'train.priority': 'priority' belongs at the top level"),
        ({"lora": {"zzz": 1}},
         "unknown key 'lora.zzz': the keys here are r, lora_alpha, use_rslora, rank_pattern, alpha_pattern,"
         " target_modules, lora_dropout, layers_to_transform, init_lora_weights, use_dora"),
        ({"lora": 3}, "lora must be a block of options, not 3"),
        ({"train": None}, "train must be a block of options, not empty"),
        ({"lora": {"target_modules": ["q_proj", 1]}}, "lora.target_modules[1] must be text, not 1"),
        ({"lora": {"target_modules": []}}, "lora.target_modules must not be empty"),
        ({"lora": {"lora_alpha": True}}, "lora.lora_alpha must be a number, not true"),
        ({"lora": {"lora_dropout": 0.1, "use_dora": True}},
         "lora.use_dora needs lora_dropout to be 0: with dropout PEFT computes another formula, in which the frozen"
         " weights' product is dropped too"),
        ({"lora": {"lora_dropout": 1.0}}, "lora.lora_dropout must be less than 1.0, not 1.0"),
        ({"lora": {"lora_dropout": 1e-5}},
         "lora.lora_dropout must be 0 or at least 1/65,536 (1.6e-05): less would drop nothing"),
        ({"train": {"epochs": 1.5}}, "train.epochs must be a whole number, not 1.5"),
        ({"train": {"learning_rate": 0}}, "train.learning_rate must be more than 0.0, not 0"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate must be a number, not the text 'NaN'"),
        ({"base_model": ""}, "base_model must not be empty"),
        ({"validation": True}, "validation must be a number or text, not true"),
        ({"lora": {"rank_pattern": {"q_proj": 0}}}, "lora.rank_pattern.q_proj must be at least 1, not 0"),
        ({"lora": {"alpha_pattern": {"q_proj": "8"}}}, "lora.alpha_pattern.q_proj must be a number, not the text '8'"),
        ({"lora": {"rank_pattern": 8}}, "lora.rank_pattern must be a block of options, not 8"),
        ({"lora": {"rank_pattern": {"(q": 8}}},
         "lora.rank_pattern has the key '(q', which is no regular expression (missing ), unterminated subpattern at"
         " position 0)"),
        ({"lora": {"alpha_pattern": {"(?i)Q": 8}}},
         "lora.alpha_pattern has the key '(?i)Q', which is no regular expression (global flags not at the start of"
         " the expression at position 8)"),
        ({"lora": {"layers_to_transform": [0, -1]}}, "lora.layers_to_transform[1] must be at least 0, not -1"),
        ({"lora": {"layers_to_transform": 1}}, "lora.layers_to_transform must be a list, not 1"),
        ({"lora": {"layers_to_transform": []}}, "lora.layers_to_transform must not be empty"),
        ({"lora": {"init_lora_weights": "olora"}},
         "lora.init_lora_weights must be one of true, 'gaussian' or 'pissa', not the text 'olora'"),
        ({"train": {"loraplus_lr_ratio": 0}}, "train.loraplus_lr_ratio must be more than 0.0, not 0"),
        ({"train": {"max_grad_norm": 0}}, "train.max_grad_norm must be more than 0.0, not 0"),
        ({"init_adapter": ""}, "init_adapter must not be empty"),
        ({"init_adapter": 3}, "init_adapter must be text, not 3"),
        ({"time_limit": "2 hours"},
         "time_limit must be seconds, or a duration such as 90m, 2h or 1h30m, not the text '2 hours'"),
        ({"time_limit": 0}, "time_limit must be more than 0.0, not 0"),
        ({"depends_on": ["job-1", "job-2", "job-1"]},
         "depends_on must name each job once, not the text 'job-1' twice"),
        ({"priority": 5000}, "priority must be at most 1000, not 5000"),
    ],
)  # fmt: skip
def test_one_mistake_is_one_sentence(changes: dict[str, object], sentence: str) -> None:
    assert problems(**changes) == [sentence]


@pytest.mark.parametrize("name", ["", "Triage", "-x", "a/b", "a:b", "..", "a" * 65, "a\n", "ä", "a b"])
def test_an_adapter_name_that_could_not_be_a_path_or_a_model_is_refused(name: str) -> None:
    [problem] = problems(adapter=name)
    assert problem.startswith("adapter must be 1 to 64 lower-case letters")
    assert load_spec(json.dumps(GOOD | {"adapter": "0a.b_c-d" + "x" * 56})).adapter.startswith("0a")


@pytest.mark.parametrize("fraction", [0, 0.0, 0.5, 1, -0.1, 2.5, ""])
def test_validation_must_leave_rows_to_train_on(fraction: object) -> None:
    [problem] = problems(validation=fraction)
    assert problem.startswith("validation must be a fraction of the rows above 0 and below 0.5")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("base_model: x\nlora: {r: 8\ntrain: {}\n", "line 3, column 6: this is not valid YAML: expected ',' or '}'"),
        ("base_model: a\n b: c\n", "line 2, column 3: this is not valid YAML: mapping values are not allowed here"),
        ("dataset: x\nadapter: a\ndataset: y\n", "line 3, column 1: this is not valid YAML: 'dataset' is given twice"),
        ('{"dataset": "x",\n "dataset": "y"}', "line 2, column 2: this is not valid YAML: 'dataset' is given twice"),
        ("? [a, b]\n: c\n", "line 1, column 3: this is not valid YAML: a key must be a word"),
        ("a: !!python/object:os.system x\n", "line 1, column 4: this is not valid YAML: could not determine"),
        ("- base_model\n", "it must be options, one 'key: value' a line"),
        ("\n", "it must be options, one 'key: value' a line"),
    ],
)
def test_text_that_is_no_spec_says_where(text: str, sentence: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(text)
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(sentence)


JSON = '{"base_model": "b", "dataset": "/d", "adapter": "a", %s}'
YAML = "base_model: b\ndataset: /d\nadapter: a\n%s\n"
HALF = "has half of a surrogate pair, such as \\ud83d alone; write the whole character"
BOUND = "should be a finite number of at most 64 bits"
DIGITS = "9" * 5000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (JSON % r'"validation": "\ud83d", "lora": {"target_modules": ["q", "\udc00"], "rank_pattern": {"\ud83d": 3}}',
         [f"validation {HALF}", f"lora.target_modules.1 {HALF}", rf"lora.rank_pattern.\ud83d {HALF}"]),
        ('{"base_model": "b", "dataset": "/d", "adapter": "\\ud83d", "\\ud83d": 1}',
         [rf"\ud83d {HALF}", f"adapter {HALF}"]),
        (YAML % r'validation: "\ud83d"', [f"validation {HALF}"]),
        (JSON % f'"priority": {DIGITS}, "num_workers": {2**64}', [f"priority {BOUND}", f"num_workers {BOUND}"]),
        (YAML % f"priority: -{DIGITS}", [f"priority {BOUND}"]),
        (YAML % f"train: {{learning_rate: 1e999, weight_decay: {DIGITS}.5}}",
         [f"train.learning_rate {BOUND}", f"train.weight_decay {BOUND}"]),
        (JSON % '"train": {"learning_rate": 1e999}', [f"train.learning_rate {BOUND}"]),
        (YAML % f'priority: !!int "{DIGITS}"', [f"priority {BOUND}"]),
        (YAML % r'validation: "\UFFFFFFFF"', ["line 4, column 16: this is not valid YAML: there is no such character"]),
        (YAML % "validation: a\0b", ["line 4: this is not valid YAML: unacceptable character #x0000: special characters"
                                     " are not allowed"]),
    ],
)  # fmt: skip
def test_text_and_numbers_that_nothing_can_use_are_named(text: str, expected: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(text)
    assert caught.value.problems == expected
    str(caught.value).encode()


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' * 100_000,
        JSON % f'"lora": {"[" * 100_000}',
        YAML % ("lora: " + "[" * 100_000),
        YAML % ("lora: " + "{a: " * 100_000),
        "\n" + "- " * 5000,
        "\n" + "".join(f"{' ' * depth}a:\n" for depth in range(2000)),
    ],
    ids=["json", "json list", "list", "mapping", "items", "blocks"],
)
def test_deep_nesting_is_a_sentence_with_its_line(text: str) -> None:
    with pytest.raises(SpecError, match=r"line \d+, column \d+: this is not valid YAML: it nests more than 20 deep"):
        load_spec(text)


def test_an_alias_stands_for_one_value_and_never_for_a_thousand_million() -> None:
    spec = load_spec(YAML % "lora: {r: &rank 4, lora_alpha: *rank}")
    assert (spec.lora.r, spec.lora.lora_alpha) == (4, 4.0)
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(20)
    )
    for text, where in (
        (bomb, "line 2, column 8"),
        ("a: &a [*a]\n", "line 1, column 8"),
        ("a: &a {x: 1}\nb: {!!merge x: *a}\n", "line 2, column 16"),
    ):
        with pytest.raises(SpecError, match=rf"{where}: this is not valid YAML: \*a stands for more than one value"):
            load_spec(text)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("!!int x", "'x' is not what int means"),
        ("!!float x", "'x' is not what float means"),
        ("!!bool x", "'x' is not what bool means"),
        ("!!null x", "'x' is not what null means"),
        ("!!int [1]", "expected a scalar node, but found sequence"),
        ("!!map x", "expected a mapping node, but found scalar"),
        ("!!timestamp x", "could not determine a constructor for the tag 'tag:yaml.org,2002:timestamp'"),
    ],
)
def test_a_tag_that_does_not_fit_is_a_sentence(value: str, problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(YAML % f"validation: {value}")
    assert caught.value.problems == [f"line 4, column 13: this is not valid YAML: {problem}"]


def test_yaml_words_are_not_turned_into_something_else() -> None:
    spec = load_spec("base_model: x\ndataset: /d\nadapter: no\ntrain: {seed: 010, learning_rate: 1E-3}\n")
    assert (spec.adapter, spec.train.seed, spec.train.learning_rate) == ("no", 10, 1e-3)
    with pytest.raises(SpecError, match="use_rslora must be true or false, not the text 'yes'"):
        load_spec("base_model: x\ndataset: /d\nadapter: a\nlora: {use_rslora: yes}\n")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nothing\.yaml: cannot read it \(No such file or directory\): give the path"):
        load_spec(tmp_path / "nothing.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match=r"binary: cannot read it \(it is not UTF-8 text\): give the path"):
        load_spec(tmp_path / "binary")


def test_paths_are_absolute_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    local = load_spec("base_model: b\ndataset: data/rows.jsonl\nvalidation: ~/held.jsonl\nadapter: a\n")
    assert local.dataset == str(tmp_path / "data/rows.jsonl")
    assert local.validation == str(tmp_path / "home/held.jsonl")
    assert load_spec("base_model: b\ndataset: ~nobody-here/rows.jsonl\nadapter: a\n").dataset.endswith("/rows.jsonl")
    start = {
        "adapters/triage": str(tmp_path / "adapters/triage"),
        "./a:b": str(tmp_path / "a:b"),
        "~/triage": str(tmp_path / "home/triage"),
        "~nobody-of-this-name/triage": str(tmp_path / "~nobody-of-this-name/triage"),
        "s3://bucket/triage": "s3://bucket/triage",
        "smollm2-135m:triage": "smollm2-135m:triage",
        "smollm2-135m:triage@0123456789abcdef": "smollm2-135m:triage@0123456789abcdef",
    }
    for given, located in start.items():
        text = f"base_model: b\ndataset: /rows.jsonl\nadapter: a\ninit_adapter: {given}\n"
        assert load_spec(text).init_adapter == located
    for name in ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "s3://bucket/base", "/models/base"):
        spec = load_spec(f"base_model: {name}\ndataset: s3://bucket/rows.jsonl\nvalidation: 0.2\nadapter: a\n")
        assert (spec.base_model, spec.dataset, spec.validation) == (name, "s3://bucket/rows.jsonl", 0.2)


def test_content_is_what_is_trained_and_not_where_it_lies_or_when_it_runs() -> None:
    spec = JobSpec.model_validate(GOOD)
    key = spec.content_key("d1")
    assert key == spec.model_copy(
        update={"dataset": "/elsewhere", "priority": 7, "time_limit": 60.0, "metadata": {"team": "x"}}
    ).content_key("d1")
    assert key == JobSpec.model_validate(GOOD | {"lora": {"lora_alpha": 32}, "train": {"epochs": 3}}).content_key("d1")
    assert list(json.loads(spec.canonical_json())) == sorted(JobSpec.model_fields), "not in the order of the source"
    other = [
        spec.content_key("d2"),
        spec.model_copy(update={"validation": "/v"}).content_key("d1", "v1"),
        spec.model_copy(update={"validation": "/v"}).content_key("d1", "v2"),
        *(JobSpec.model_validate(GOOD | change).content_key("d1") for change in ({"base_model": "other"},
         {"adapter": "other"}, {"validation": 0.1}, {"lora": {"r": 8}}, {"train": {"seed": 1}}, {"precision": "fp32"},
         {"num_workers": 2}, {"depends_on": ["job-1"]})),
    ]  # fmt: skip
    assert len({key, *other}) == len(other) + 1
    started = [
        JobSpec.model_validate(GOOD | {"init_adapter": source}).content_key("d1", None, sha)
        for source, sha in (("b:x", "a1"), ("/x", "a1"), ("/x", "a2"))
    ]
    assert started[0] == started[1] and len({key, *started}) == 3
    moved = spec.model_copy(update={"validation": "/v", "dataset": "/x"}), spec.model_copy(update={"validation": "/w"})
    assert moved[0].content_key("d1", "v1") == moved[1].content_key("d1", "v1")


def test_the_order_of_a_pattern_is_content() -> None:
    """The first key that matches counts, so that both readings must survive storage and differ as content."""
    patterns: list[dict[str, int]] = [{"q_proj": 2, ".*_proj": 4}, {".*_proj": 4, "q_proj": 2}]
    specs = [JobSpec.model_validate(GOOD | {"lora": {"rank_pattern": pattern}}) for pattern in patterns]
    stored = [JobSpec.model_validate_json(spec.canonical_json()) for spec in specs]
    assert [[*spec.lora.rank_pattern] for spec in stored] == [[*pattern] for pattern in patterns]
    assert specs[0].content_key("d1") != specs[1].content_key("d1")


def test_errors_survive_the_way_between_processes() -> None:
    error = SpecError(["one", "two"], "job.yaml")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "job.yaml has 2 problems:\n  - one\n  - two"
    assert copy.problems == ["one", "two"]


def test_the_queue_can_be_used_without_torch_or_ray() -> None:
    code = (
        "import jobs.store.jobs, jobs.scheduling.policy, sys; print([m for m in ('torch', 'ray') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
