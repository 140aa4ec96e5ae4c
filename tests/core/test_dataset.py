"""Rows -> ids and labels: what is trained is what will be served, and every mistake is named with its line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_core.data.dataset import Dataset, DatasetError, Example, build_examples, check_rows, split
from lora_core.data.format import RowNumber
from lora_core.models.files import load_tokenizer, local_folder
from tests.support.rows import chat, message, numbered
from tests.support.tiny_models import smollm2_gguf

SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
CORPUS = [
    "system user assistant abcdef abc def ### the answer is Paris, and 42.",
    "User: hello Assistant: yes no maybe\n\n",
    "abcdef",
]

# How Llama 3 and Qwen cut text into words (line breaks stay together), and how GPT-2 does (the last one goes astray).
LLAMA3_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2_SPLIT = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3: thoughts stay only behind the last question, and an answer that ends the conversation gets an empty block.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'assistant' %}{% set thought = '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].lstrip() %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{% set content = '<think>\n' + thought + '\n</think>\n\n' + content %}{% endif %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
UNENDED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# DeepSeek-R1: served behind "<think>", which is not in a rendered answer.
UNCONTINUED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def wrapped(tokenizer: Tokenizer, **kwargs: Any) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", **kwargs)


def byte_level(
    template: str | None, end: str, *, bos: bool = False, pattern: str = LLAMA3_SPLIT
) -> PreTrainedTokenizerBase:
    """A byte-level BPE that merges whole words; with `bos` it puts <s> before a text, as Llama's does."""
    tokenizer = Tokenizer.from_str(trained_bpe(pattern))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(tokenizer, bos_token="<s>", eos_token=end, chat_template=template)


@cache
def trained_bpe(pattern: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    serialised: str = tokenizer.to_str()
    return serialised


def sentence_piece(template: str | None) -> PreTrainedTokenizerBase:
    """Metaspace, as Llama 2 and Mistral have it: a text's first word gets a space in front."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = [chr(code) for code in range(33, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template)


@pytest.fixture(scope="session")
def smollm2(shared_cache: Path) -> PreTrainedTokenizerBase:
    """The demo's real tokenizer."""
    return load_tokenizer(local_folder(smollm2_gguf(), shared_cache))


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "chatml": lambda: byte_level(CHATML, "<|im_end|>"),
    "thinking": lambda: byte_level(THINKING, "<|im_end|>"),
    "llama3": lambda: byte_level(LLAMA3, "<|eot_id|>", bos=True),
    "astray": lambda: byte_level(LLAMA3, "<|eot_id|>", pattern=GPT2_SPLIT),
    "mistral": lambda: sentence_piece(MISTRAL),
    "unended": lambda: byte_level(UNENDED, "</s>"),
}


@pytest.fixture(params=["smollm2", *TOKENIZERS])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param == "smollm2":
        real: PreTrainedTokenizerBase = request.getfixturevalue("smollm2")
        return real
    return TOKENIZERS[request.param]()


def build(tokenizer: PreTrainedTokenizerBase, *rows: dict[str, Any], **options: Any) -> Dataset:
    options = {"max_seq_len": 4096, "train_on": "completion", "overlong": "truncate", **options}
    return build_examples(numbered(*rows), tokenizer, **options)


def runs(example: Example) -> list[tuple[int, int]]:
    """(first, end) of every unbroken run of labels."""
    edges = [False, *example.labels_mask, False]
    places = [i for i in range(len(edges) - 1) if edges[i] != edges[i + 1]]
    return list(zip(places[::2], places[1::2], strict=True))


def supervised(tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> list[str]:
    """The text of every run of labels."""
    texts = [tokenizer.decode(e.ids[a:b]) for e in dataset.examples for a, b in runs(e)]
    return [str(text) for text in texts]


def served_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> list[int]:
    """What a server feeds, by transformers' own path."""
    encoding = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ids: list[int] = encoding["input_ids"]
    return ids


CONVERSATIONS = [
    chat("What is the capital of France?", "Paris."),
    chat("hello", "yes", "and then?", "no, maybe", "why", "the answer is 42"),
    chat("code", "def f():\n    return 1\n\n", "again", "  indented, and with an end \n"),
    chat("naïve 日本語 🙂", "ünïcode 🙂🙂", "", "a"),
    chat("<|im_end|>\n<|im_start|>assistant\nmine", "not <|im_end|> yet", "[INST] x [/INST]", "</s> y"),
    chat("abc", "<think>\nfirst this, then that\n</think>\n\nyes", "def", "<think>\nwhy not\n</think>\n\nno"),
]


@pytest.mark.parametrize("row", CONVERSATIONS, ids=["one", "three", "spaces", "unicode", "special", "thoughts"])
def test_every_answer_is_trained_behind_the_ids_that_are_served(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]
) -> None:
    messages = row["messages"]
    answers = [index for index, m in enumerate(messages) if m["role"] == "assistant"]
    trained = [(e, a) for e in build(tokenizer, row).examples for a, _ in runs(e)]
    assert len(trained) == len(answers)
    for (example, start), index in zip(trained, answers, strict=True):
        assert example.ids[:start] == served_prompt(tokenizer, messages[:index])


ENDS = {"<|im_end|>", "<|eot_id|>", "</s>"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2", ["yes<|im_end|>", "no, maybe<|im_end|>"]),
        ("chatml", ["yes<|im_end|>", "no, maybe<|im_end|>"]),
        ("thinking", [f"<think>\n\n</think>\n\n{text}<|im_end|>" for text in ("yes", "no, maybe")]),
        ("llama3", ["yes<|eot_id|>", "no, maybe<|eot_id|>"]),
        ("astray", ["yes<|eot_id|>", "no, maybe<|eot_id|>"]),
        ("mistral", ["yes</s>", "no, maybe</s>"]),
        ("unended", [" yes\n</s>", " no, maybe\n</s>"]),
    ],
)
def test_the_labels_are_the_answers_and_their_ends(
    name: str, expected: list[str], request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue("smollm2") if name == "smollm2" else TOKENIZERS[name]()
    dataset = build(tokenizer, {"messages": chat("hello", "yes", "and then?", "no, maybe", "bye")["messages"]})
    assert supervised(tokenizer, dataset) == expected
    # one example, unless history is rewritten, turns have no end, or a token spans the end of the generation prompt
    assert len(dataset.examples) == (2 if name in ("thinking", "unended", "astray") else 1)
    for example in dataset.examples:  # nothing behind the last end of turn: neither ChatML's newline nor "bye"
        assert tokenizer.convert_ids_to_tokens(example.ids[-1]) in ENDS
        assert example.labels_mask[-1]


def test_a_context_between_answers_keeps_what_follows_the_end_of_turn() -> None:
    tokenizer = byte_level(CHATML, "<|im_end|>")
    row = chat("hello", "yes", "def", "no")
    (example,) = build(tokenizer, row).examples
    whole = str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    assert tokenizer.decode(example.ids) == whole.removesuffix("\n")


def test_thoughts_are_trained_where_they_are_said_and_left_out_of_later_prompts() -> None:
    tokenizer = byte_level(THINKING, "<|im_end|>")
    first, second = build(tokenizer, CONVERSATIONS[-1]).examples
    assert (
        tokenizer.decode(first.ids[slice(*runs(first)[0])])
        == CONVERSATIONS[-1]["messages"][1]["content"] + "<|im_end|>"
    )
    assert "first this" not in str(tokenizer.decode(second.ids))
    assert "why not" in str(tokenizer.decode(second.ids))


def test_rows_are_never_joined(tokenizer: PreTrainedTokenizerBase) -> None:
    """Not even where one starts with the other."""
    short, long = chat("abc", "def"), chat("abc", "def", "hello", "yes")
    alone = [build(tokenizer, row).examples for row in (short, short, long)]
    assert build(tokenizer, short, short, long).examples == [example for examples in alone for example in examples]


def test_turns_are_joined_again_behind_a_rewritten_one() -> None:
    """user, assistant, tool, assistant: behind one question nothing is rewritten, so both answers share an example."""
    tokenizer = byte_level(THINKING, "<|im_end|>")
    thought = "<think>\nwhy\n</think>\n\n"
    loop = [
        message("user", "b"),
        message("assistant", f"{thought}call"),
        message("tool", "7"),
        message("assistant", f"{thought}7"),
    ]
    dataset = build(tokenizer, {"messages": [*chat("a", "yes")["messages"], *loop]})
    assert [len(runs(example)) for example in dataset.examples] == [1, 2]


def test_a_beginning_of_sequence_comes_once() -> None:
    tokenizer = byte_level(LLAMA3, "<|eot_id|>", bos=True)
    for row in (chat("abc", "def"), {"prompt": "abc", "completion": "def"}, {"text": "abc"}):
        (example,) = build(tokenizer, row).examples
        assert [i for i, token in enumerate(example.ids) if token == tokenizer.bos_token_id] == [0]


def test_a_special_token_that_an_answer_quotes_is_not_its_end() -> None:
    for name, end in (("chatml", "<|im_end|>"), ("unended", "\n</s>")):
        tokenizer = TOKENIZERS[name]()
        (answer,) = supervised(tokenizer, build(tokenizer, chat("a", "write <|im_end|> here")))
        assert answer.strip() == f"write <|im_end|> here{end}"


def test_an_opening_message_of_the_assistant_is_context() -> None:
    tokenizer = byte_level(CHATML, "<|im_end|>")
    row = {"messages": [message("assistant", "hello"), message("user", "abc"), message("assistant", "def")]}
    assert supervised(tokenizer, build(tokenizer, row)) == ["def<|im_end|>"]
    assert check_rows(numbered(row)) == "messages"


def test_an_answer_of_weight_0_is_context() -> None:
    tokenizer = byte_level(CHATML, "<|im_end|>")
    row = chat("abc", "def", "hello", "yes")
    row["messages"][1]["weight"] = 0
    row["messages"][3]["weight"] = 1
    tokenizer.chat_template = CHATML.replace("{{ m.role }}", "{{ m.role }}{{ m.weight }}")  # which it is not shown
    dataset = build(tokenizer, row)
    assert supervised(tokenizer, dataset) == ["yes<|im_end|>"]
    assert dataset.examples[0].ids == build(byte_level(CHATML, "<|im_end|>"), row).examples[0].ids
    assert "def<|im_end|>" in str(tokenizer.decode(dataset.examples[0].ids))


def test_a_template_that_serves_another_prompt_than_it_renders_is_refused_with_the_lines() -> None:
    tokenizer = byte_level(UNCONTINUED, "<|im_end|>")
    with pytest.raises(DatasetError) as raised:
        build(tokenizer, chat("a", "b"), chat("a", "<think>\nc\n</think>\nb"), chat("a", "b"))
    assert [text.split(": the")[0] for text in raised.value.problems] == [
        "line 1: column `messages`",
        "line 3: column `messages`",
    ]
    assert "answer 1" in raised.value.problems[0]


def test_conversations_that_the_template_refuses_are_reported_with_its_reason() -> None:
    tokenizer = sentence_piece(MISTRAL)
    rows = [chat("a", "b") for _ in range(600)]
    for index in (2, 599):  # in different batches
        rows[index] = {"messages": [message("system", "s"), *chat("a", "b")["messages"]]}
    with pytest.raises(DatasetError) as raised:
        build(tokenizer, *rows)
    assert [text.split(":")[0] for text in raised.value.problems] == ["line 3", "line 600"]
    assert "roles must alternate" in raised.value.problems[0]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("abc", "def"), ("the answer is ", "Paris"), ("User:", " yes"), ("", "Paris"), ("a\n", "\nb")],
)
@pytest.mark.parametrize("kind", ["byte_level", "byte_level_bos", "sentence_piece"])
def test_a_completion_follows_the_served_ids_of_its_prompt(kind: str, prompt: str, completion: str) -> None:
    kinds = {
        "byte_level": lambda: byte_level(None, "</s>"),
        "byte_level_bos": lambda: byte_level(None, "</s>", bos=True),
        "sentence_piece": lambda: sentence_piece(None),
    }
    tokenizer = kinds[kind]()
    (example,) = build(tokenizer, {"prompt": prompt, "completion": completion}).examples
    served = tokenizer(prompt)["input_ids"]
    assert example.ids[: len(served)] == served
    ((start, end),) = runs(example)
    assert start == max(len(served), 1)
    assert end == len(example.ids)
    assert example.ids[-1] == tokenizer.eos_token_id
    text = str(tokenizer.decode(example.ids, skip_special_tokens=True))
    assert text == prompt + completion  # no space slips in between


def test_tokens_that_span_the_boundary_are_cut_there() -> None:
    tokenizer = byte_level(None, "</s>")
    prompt, whole = tokenizer("abc")["input_ids"], tokenizer("abcdef")["input_ids"]
    assert whole[: len(prompt)] != prompt, "the test needs a tokenizer that merges across the boundary"
    (example,) = build(tokenizer, {"prompt": "abc", "completion": "def"}).examples
    assert example.ids == [*prompt, *tokenizer("def")["input_ids"], tokenizer.eos_token_id]


def test_an_end_of_sequence_in_the_data_is_not_doubled() -> None:
    tokenizer = byte_level(None, "</s>")
    (example,) = build(tokenizer, {"prompt": "abc", "completion": " yes</s>"}).examples
    assert example.ids.count(tokenizer.eos_token_id) == 1


def test_prompt_and_completion_may_be_messages() -> None:
    tokenizer = byte_level(CHATML, "<|im_end|>")
    messages = chat("abc", "def", "hello", "yes")["messages"]
    row = {"prompt": messages[:3], "completion": messages[3:]}
    dataset = build(tokenizer, {"prompt": "abc", "completion": "Paris"}, row, {"prompt": "abc", "completion": "42"})
    assert supervised(tokenizer, dataset) == ["Paris<|im_end|>", "yes<|im_end|>", "42<|im_end|>"]
    assert dataset.examples[1].ids == build(tokenizer, {"messages": messages}).examples[0].ids


def test_alpaca_is_a_chat_where_there_is_a_template() -> None:
    tokenizer = byte_level(CHATML, "<|im_end|>")
    rows = [
        {"instruction": "abc", "input": "hello", "output": "def"},
        {"instruction": "abc", "input": "", "output": "def"},
        {"instruction": "abc", "output": "def", "text": "rendered"},
    ]
    dataset = build(tokenizer, *rows)
    assert dataset.examples == build(tokenizer, chat("abc\n\nhello", "def"), *[chat("abc", "def")] * 2).examples
    assert dataset.report.format == "instruction/output"
    assert dataset.report.ignored_columns == ("text",)


def test_alpaca_is_its_own_text_where_there_is_none() -> None:
    tokenizer = byte_level(None, "</s>")
    rows = [{"instruction": "abc", "input": "hello", "output": "def"}, {"instruction": "abc", "output": "def"}]
    dataset = build(tokenizer, *rows)
    assert supervised(tokenizer, dataset) == ["def</s>", "def</s>"]
    task = "Below is an instruction that describes a task"
    request = ". Write a response that appropriately completes the request.\n\n### Instruction:\nabc\n\n"
    assert [tokenizer.decode(example.ids) for example in dataset.examples] == [
        f"{task}, paired with an input that provides further context{request}### Input:\nhello\n\n"
        "### Response:\ndef</s>",
        f"{task}{request}### Response:\ndef</s>",
    ]


def test_all_of_a_text_is_trained_but_its_first_token() -> None:
    tokenizer = byte_level(None, "</s>")
    (example,) = build(tokenizer, {"text": "the answer is 42"}).examples
    assert example.ids == [*tokenizer("the answer is 42")["input_ids"], tokenizer.eos_token_id]
    assert example.labels_mask == [False] + [True] * (len(example.ids) - 1)


@pytest.mark.parametrize("row", [chat("a", "b", "c", "d", "e"), {"prompt": "a", "completion": "b"}, {"text": "a b"}])
def test_train_on_all_supervises_everything_but_the_first_token(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]
) -> None:
    (example,) = build(tokenizer, row, train_on="all").examples
    assert example.labels_mask == [False] + [True] * (len(example.ids) - 1)
    if "messages" in row:  # once, up to the last answer, with a token that ends it
        whole = str(tokenizer.apply_chat_template(row["messages"][:4], tokenize=False))
        ended = whole.removesuffix("\n") if any(end in whole for end in ENDS) else f"{whole}</s>"
        assert example.ids == tokenizer(ended, add_special_tokens=False)["input_ids"]


def test_a_first_token_is_never_a_label(tokenizer: PreTrainedTokenizerBase) -> None:
    for row in (
        chat("a", "b"),
        {"prompt": "", "completion": "abc"},
        {"text": "abc"},
        {"instruction": "a", "output": "b"},
    ):
        for train_on in ("completion", "all"):
            assert not any(e.labels_mask[0] for e in build(tokenizer, row, train_on=train_on).examples)


def test_messages_need_a_chat_template_and_answers_an_end() -> None:
    with pytest.raises(DatasetError, match="no chat template"):
        build(byte_level(None, "</s>"), chat("a", "b"))
    endless = byte_level(None, "</s>")
    endless.eos_token = None
    with pytest.raises(DatasetError, match="no eos_token"):
        build(endless, {"prompt": "a", "completion": "b"})


def test_rows_without_lines_are_named_as_rows_by_whatever_is_wrong_with_them() -> None:
    """Those of Parquet, and of one JSON array."""
    tokenizer = byte_level(MISTRAL.replace("{{ bos_token }}", ""), "<|im_end|>")
    options: dict[str, Any] = {"max_seq_len": 40, "train_on": "completion", "overlong": "truncate"}
    twice = {"messages": [message("user", "a"), message("user", "b"), message("assistant", "c")]}
    for row, more, expected in (
        (twice, {}, "row 2: column `messages`: the chat template refuses"),
        ({"messages": []}, {}, "row 2: column `messages`: an empty list"),
        (chat("a", "b"), {"token_rows": 3}, "row 2: the token "),
        (chat("a" * 99, "b"), {}, "no supervised token is left in rows 2:"),
    ):
        with pytest.raises(DatasetError) as raised:
            build_examples([(RowNumber(2), row)], tokenizer, **options, **more)
        assert raised.value.problems[0].startswith(expected)


def test_tokens_that_the_base_has_no_row_for_are_refused_with_their_lines() -> None:
    """In prompts, answers and texts, unless they are cut off; and the end that every row gets."""
    tokenizer = byte_level(CHATML, "<|im_end|>")
    tokenizer.add_tokens([AddedToken("<|image|>", special=True)])
    beyond = tokenizer.convert_tokens_to_ids("<|image|>")
    rows = [
        chat("a", "b"),
        chat("what is <|image|>?", "b"),
        chat("a", "b", "c", "an <|image|>"),
        chat("<|image|>", "b"),
    ]
    with pytest.raises(DatasetError) as raised:
        build(tokenizer, *rows, token_rows=beyond)
    assert [text.split(" and the base")[0] for text in raised.value.problems] == [
        f"line {line}: the token `<|image|>` has the id {beyond}," for line in (2, 3, 4)
    ]
    assert f"embedding {beyond} rows; change or leave out the row" in raised.value.problems[0]
    assert build(tokenizer, *rows, token_rows=beyond + 1).examples == build(tokenizer, *rows).examples
    answered = len(build(tokenizer, chat("a", "b")).examples[0].ids)
    assert build(tokenizer, chat("a", "b", "c", "<|image|>"), token_rows=beyond, max_seq_len=answered).examples
    tokenizer.eos_token = "<|image|>"
    for row in ({"text": "abc"}, {"prompt": "<|image|>", "completion": "b"}):
        with pytest.raises(DatasetError, match=r"^line 1: the token `<\|image\|>`"):
            build(tokenizer, row, token_rows=beyond)


def test_over_long_rows_lose_their_end_or_are_dropped() -> None:
    tokenizer = byte_level(None, "</s>")
    rows = [{"prompt": "a", "completion": "b" * size} for size in (3, 6, 7, 20)]  # 5, 8, 9 and 22 tokens
    whole = build(tokenizer, *rows)
    assert whole.report.lengths == (5, 8, 9, 22)
    cut = build(tokenizer, *rows, max_seq_len=8)
    assert [e.ids for e in cut.examples] == [e.ids[:8] for e in whole.examples]
    assert (cut.report.overlong, cut.report.longest, cut.report.unlabelled) == (2, 22, ())
    dropped = build(tokenizer, *rows, max_seq_len=8, overlong="drop")
    assert dropped.examples == whole.examples[:2]
    assert (dropped.report.overlong, dropped.report.longest, dropped.report.unlabelled) == (2, 22, (3, 4))
    assert "2 rows longer than max_seq_len=8 tokens: truncated" in cut.report.lines()
    assert "2 rows longer than max_seq_len=8 tokens: dropped" in dropped.report.lines()


def test_a_cut_conversation_ends_with_its_last_label() -> None:
    tokenizer = byte_level(CHATML, "<|im_end|>")
    row = chat("hello", "yes", "abc " * 20, "no")
    full = build(tokenizer, row).examples[0]
    (cut,) = build(tokenizer, row, max_seq_len=len(full.ids) - 5).examples
    assert cut.ids == full.ids[: runs(full)[0][1]]


def test_rows_whose_answers_are_cut_off_are_named_and_all_of_them_refused() -> None:
    tokenizer = byte_level(CHATML, "<|im_end|>")
    short, long = chat("a", "b"), chat("x" * 100, "b")
    report = build(tokenizer, short, long, short, long, max_seq_len=60).report
    assert (report.rows, report.examples, report.unlabelled) == (4, 2, (2, 4))
    assert "2 rows without a supervised token: lines 2, 4" in report.lines()
    for rule in ("truncate", "drop"):
        with pytest.raises(DatasetError, match=r"no supervised token is left in lines 1, 2: .* raise max_seq_len=60"):
            build(tokenizer, long, long, max_seq_len=60, overlong=rule)
    muted = {"messages": [message("user", "a"), message("assistant", "b", weight=0)]}
    with pytest.raises(DatasetError, match="no supervised token is left in lines 1: every answer has weight 0"):
        build(tokenizer, muted)


def test_the_report_adds_up(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {**chat("hello", "yes", "abc", "no"), "source": "x", "id": 3}
    dataset = build(tokenizer, row, chat("a", "b"))
    report = dataset.report
    assert report.tokens == sum(len(e.ids) for e in dataset.examples)
    assert report.supervised_tokens == sum(sum(e.labels_mask) for e in dataset.examples)
    assert report.longest == max(len(e.ids) for e in dataset.examples)
    assert (report.format, report.rows, report.overlong, report.unlabelled) == ("messages", 2, 0, ())
    assert report.ignored_columns == ("id", "source")
    assert "ignored columns: id, source" in report.lines()
    assert f"2 rows of messages, {len(dataset.examples)} examples" in report.lines()


def test_packing_efficiency_is_the_share_that_is_no_padding() -> None:
    tokenizer = byte_level(None, "</s>")
    rows = [{"prompt": "a", "completion": "b" * (size - 2)} for size in (6, 4, 5, 5, 7)]
    report = build(tokenizer, *rows).report
    assert report.lengths == (6, 4, 5, 5, 7)
    assert report.packing_efficiency(10) == 27 / 30  # 6 + 4 | 5 + 5 | 7
    assert report.packing_efficiency(9) == 27 / 36  # 6 | 4 + 5 | 5 | 7: the last two do not fit together
    assert report.packing_efficiency(5) == 27 / (6 + 5 + 5 + 5 + 7)  # a longer one is a batch of its own
    assert any("packing efficiency 90.0% at 10 tokens" in line for line in replace(report, max_seq_len=10).lines())


def test_a_split_is_a_partition_that_depends_on_seed_and_nothing_else() -> None:
    for count, fraction, held_out in ((2, 0.01, 1), (10, 0.25, 2), (300, 0.1, 30), (3, 0.9, 2), (2, 0.9, 1)):
        train, validation = split(count, fraction, seed=0)
        assert sorted(train + validation) == list(range(count))
        assert len(validation) == held_out
    assert split(300, 0.1, seed=7) == split(300, 0.1, seed=7) != split(300, 0.1, seed=8)
    assert split(10, 0.3, seed=0)[1] == [4, 7, 9]  # frozen: a resumed job must hold out the same rows
    assert split(301, 0.1, seed=7)[1] != list(range(30))
    with pytest.raises(DatasetError, match="two rows"):
        split(1, 0.1, seed=0)
