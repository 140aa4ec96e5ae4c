"""Messages and prompts -> ids: training and serving refuse the same and feed the same, whatever a template is."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from deploy.api.schemas import ApiError, ChatRequest, TextRequest, parse_request
from deploy.serving.server import AdapterServer
from lora_core.data.dataset import DatasetError, Example, build_examples
from lora_core.data.format import Row
from lora_core.data.prompts import NoTemplateError, PromptError, prompt_ids, rendered
from lora_core.inference.detokenizer import end_tokens
from tests.support.models import tiny_base
from tests.support.rows import chat, clock_says, message, numbered
from tests.support.tiny_models import CHAT_TEMPLATE, DATED_TEMPLATE, SPECIALS, byte_tokenizer

# It shows whatever else than role and content a message has.
PRESENCE = CHAT_TEMPLATE.replace(
    "{{ m['role'] }}",
    "{{ m['role'] }}{% for key in m if key not in ['role', 'content'] %}/{{ key }}={{ m[key] }}{% endfor %}{{ '' }}",
)


def tokenizer_with(template: Any = PRESENCE, around: str | None = None) -> PreTrainedTokenizerFast:
    """Of bytes; `around` is what its post-processor makes of a text, which is `$A` there."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = SPECIALS[1], SPECIALS[2]
    tokenizer.chat_template = template
    if around is not None:
        special_tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in SPECIALS]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=special_tokens
        )
    return tokenizer


def trained(tokenizer: PreTrainedTokenizerFast, row: Row) -> Example:
    built = build_examples(numbered(row), tokenizer, max_seq_len=4096, train_on="completion", overlong="truncate")
    (example,) = built.examples
    return example


def served(tokenizer: PreTrainedTokenizerFast, kind: type[ChatRequest | TextRequest] = ChatRequest, **body: Any) -> Any:
    """The ids that a server feeds for a request."""
    server: AdapterServer = object.__new__(AdapterServer)
    server._tokenizer = tokenizer
    request = parse_request(json.dumps({"model": "m", **body}).encode(), kind).generate_request(None, "latest")
    return server._prompt(request)


ACCEPTED: list[Row] = [
    message("user", "a"),
    message("user", "a", name="Ann"),
    message("user", "a", name="", tool_calls=[], function_call={}, refusal=None, annotations=[], audio=None),
    message("user", ""),
    message("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": None}]),  # type: ignore[arg-type]
    message("developer", "Be brief."),
    message("assistant", ""),
    message("assistant", "a", weight=0),
    message("assistant", "a", reasoning_content="because"),
    message("tool", "7", tool_call_id="c1"),
]
REFUSED: list[Any] = [
    "a",
    {},
    message("function", "a"),
    message("user", None),  # type: ignore[arg-type]
    message("user", []),  # type: ignore[arg-type]
    message("user", 7),  # type: ignore[arg-type]
    message("user", [{"type": "image_url", "image_url": "x"}]),  # type: ignore[arg-type]
    message("user", [{"type": "text"}]),  # type: ignore[arg-type]
    message(["user"], "a"),  # type: ignore[arg-type]
    message("assistant", "a", tool_calls=[{"id": "c1"}]),
    message("assistant", "a", function_call={"name": "f"}),
    message("assistant", "a", weight=0.5),
    message("user", "a", name=3),
    message("user", "a", audio={"id": "x"}),
]


@pytest.mark.parametrize("given", ACCEPTED, ids=str)
def test_training_and_serving_feed_the_same_ids_for_a_message(given: Row) -> None:
    messages = [message("user", "Hi"), given, message("user", "and?")]
    example = trained(tokenizer_with(), {"prompt": messages, "completion": [message("assistant", "yes")]})
    prompt = served(tokenizer_with(), messages=messages)
    assert example.ids[: len(prompt)] == prompt
    assert example.labels_mask.index(True) == len(prompt)


@pytest.mark.parametrize("given", REFUSED, ids=str)
def test_training_and_serving_refuse_the_same_messages(given: Any) -> None:
    messages = [message("user", "Hi"), given, message("user", "and?")]
    with pytest.raises(DatasetError, match=r"^line 1: column `prompt\[1\]"):
        trained(tokenizer_with(), {"prompt": messages, "completion": [message("assistant", "yes")]})
    with pytest.raises(ApiError, match=r"messages\.1"):
        served(tokenizer_with(), messages=messages)


def test_a_template_is_shown_what_was_given_and_nothing_else() -> None:
    shown = rendered(tokenizer_with(), ACCEPTED[:5], generation_prompt=False)
    assert [line.removeprefix(SPECIALS[1]) for line in shown.splitlines()[::2]] == [
        "user", "user/name=Ann", "user", "user", "user",
    ]  # fmt: skip
    assert shown.splitlines()[-1] == f"ab{SPECIALS[2]}"


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
WITH_TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}:"
    "{{ c.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
)


def test_tools_and_calls_are_shown_by_templates_that_have_them() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    messages = [message("user", "a"), {"role": "assistant", "content": None, "tool_calls": [call]},
                message("tool", "7", tool_call_id="c1")]  # fmt: skip
    ids = served(tokenizer_with(WITH_TOOLS), messages=messages, tools=TOOLS)
    assert tokenizer_with().decode(ids) == (
        '{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}\n'
        '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<tool_call>f:{"x": "é"}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n7<|im_end|>\n"
    )
    several = {"default": CHAT_TEMPLATE, "tool_use": WITH_TOOLS}
    assert served(tokenizer_with(several), messages=messages, tools=TOOLS) == ids
    with pytest.raises(NoTemplateError, match="shows no tools; leave tools out"):
        served(tokenizer_with(), messages=messages[:1], tools=TOOLS)
    assert served(tokenizer_with(), messages=messages[:1], tools=TOOLS, tool_choice="none")
    with pytest.raises(NoTemplateError, match="shows no calls; write them into `content`"):
        served(tokenizer_with(), messages=messages)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"id": "c1"}, ": no call; write an object"),
        ({"function": {"name": 3}}, ": no call"),
        ({"function": {"name": "f", "arguments": "{"}}, ".function.arguments: no object in JSON"),
        ({"function": {"name": "f", "arguments": "[1]"}}, ".function.arguments: no object"),
        ({"function": {"name": "f", "arguments": r'{"a": "\ud83d"}'}}, ".function.arguments: no object"),
    ],
    ids=str,
)
def test_what_is_no_call_is_named(call: Any, sentence: str) -> None:
    with pytest.raises(ApiError) as caught:
        served(tokenizer_with(WITH_TOOLS), messages=[message("assistant", "a", tool_calls=[call])])
    assert f"messages.0.tool_calls.0{sentence}" in caught.value.message


def test_only_answers_that_are_learned_have_to_say_something() -> None:
    row = chat("a", " ", "b", "c")
    with pytest.raises(DatasetError, match=r"column `messages\[1\].content`: empty"):
        trained(tokenizer_with(), row)
    row["messages"][1]["weight"] = 0
    assert trained(tokenizer_with(), row).ids


# --- templates ------------------------------------------------------------------------------------------------------

ALTERNATE = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + PRESENCE


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ALTERNATE, "the chat template refuses the first message (begin with the user)"),
        ("{{ 1 / 0 }}", "the chat template fails on the first message (ZeroDivisionError: division by zero)"),
        ("{{ messages[0].content + 1 }}", "the chat template fails on the first message (TypeError: can only"),
        ("{{ messages[7].content }}", "the chat template refuses the first message (list object has no element 7)"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "(RecursionError: maximum recursion depth exceeded"),
        ("{{ 'x' * 2000000 }}", "the chat template makes 2,000,000 characters of the first message"),
        ("{% for %}", "the base model's chat template cannot be read (Expected an expression"),
        ("{{ messages | secret }}", "the base model's chat template cannot be read (No filter named 'secret'.)"),
        ({"rag": PRESENCE, "tools": "x"}, "the base model has several chat templates (rag, tools) and none is named"),
        ({"default": 7}, "the base model's chat template cannot be read (it is no text)"),
        ("", "the base model has no chat template for messages"),
        (None, "the base model has no chat template for messages"),
    ],
)
def test_what_goes_wrong_in_a_template_is_one_sentence_in_training_and_serving(template: Any, reason: str) -> None:
    tokenizer = tokenizer_with()
    tokenizer.chat_template = template
    messages = [message("system", "Hi")]
    with pytest.raises(ValueError) as in_serving:
        served(tokenizer, messages=messages)
    with pytest.raises(DatasetError) as in_training:
        trained(tokenizer, {"prompt": messages, "completion": [message("assistant", "yes")]})
    (sentence,) = in_training.value.problems
    assert reason in sentence and reason in str(in_serving.value)
    of_the_row = isinstance(in_serving.value, PromptError)
    assert sentence.startswith("line 1: column `prompt`, `completion`: ") == of_the_row
    assert "\n" not in sentence + str(in_serving.value)
    plain = trained(tokenizer, {"prompt": "a", "completion": "b"})  # needs no template
    assert plain.ids[:1] == served(tokenizer, TextRequest, prompt="a")


def test_a_base_whose_template_fails_is_served_with_plain_prompts() -> None:
    """The end of a turn, which the template would show, is looked for when a server starts."""
    for template in ("{{ 1 / 0 }}", "{% for %}", {"rag": "x"}, "no messages at all"):
        base = replace(tiny_base("llama"), tokenizer=tokenizer_with(template))
        assert end_tokens(base) >= {258}
    assert end_tokens(replace(base, tokenizer=tokenizer_with(CHAT_TEMPLATE.replace("_end|>", "_start|>")))) >= {257}


def test_the_default_of_several_templates_is_the_one() -> None:
    several = tokenizer_with({"rag": "{{ 1 / 0 }}", "default": PRESENCE})
    messages = chat("a", "b")["messages"]
    assert trained(several, {"messages": messages}) == trained(tokenizer_with(), {"messages": messages})
    assert served(several, messages=messages) == served(tokenizer_with(), messages=messages)


def test_a_clock_in_a_template_may_strike_between_a_prompt_and_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row is rendered again, instead of being called inconsistent."""
    clock_says(monkeypatch, "31 Dec", "01 Jan")
    tokenizer = tokenizer_with(DATED_TEMPLATE)
    assert str(tokenizer.decode(trained(tokenizer, chat("a", "b")).ids)).startswith("01 Jan")


def test_serving_renders_with_the_day_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_with(DATED_TEMPLATE)
    for day in ("31 Dec", "01 Jan"):
        clock_says(monkeypatch, day)
        assert str(tokenizer.decode(served(tokenizer, messages=[message("user", "Hi")]))).startswith(day)


# --- the first and last tokens of plain texts -----------------------------------------------------------------------

BOS, EOS = SPECIALS[1], SPECIALS[2]
AROUND = [None, f"{BOS} $A", f"$A {EOS}", f"{BOS} $A {EOS}", f"{BOS} {SPECIALS[0]} $A {EOS}"]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("end", ["", EOS, EOS * 2])
def test_a_document_begins_and_ends_once(around: str | None, written: bool, end: str) -> None:
    """Whether the tokenizer adds those tokens, the row has them, both or neither."""
    tokenizer = tokenizer_with(None, around)
    first = (around or "$A").split("$A")[0].replace(" ", "")
    prompt = (first if written else "") + "Q: 1+1?"
    asked = served(tokenizer, TextRequest, prompt=prompt)
    assert tokenizer.decode(asked) == f"{first}Q: 1+1?"
    completed = trained(tokenizer, {"prompt": prompt, "completion": f" 2{end}"})
    assert tokenizer.decode(completed.ids) == f"{first}Q: 1+1? 2{EOS}"
    assert completed.labels_mask == [False] * len(asked) + [True] * 3
    text = trained(tokenizer, {"text": f"{prompt} 2{end}"})
    assert text.ids == completed.ids
    assert text.labels_mask.index(True) == max(1, first.count("<"))


def test_a_token_that_the_row_alone_has_stays() -> None:
    tokenizer = tokenizer_with(None)
    row = {"prompt": f"{BOS}a{EOS}", "completion": f"{EOS}"}
    assert tokenizer.decode(trained(tokenizer, row).ids) == f"{BOS}a{EOS}{EOS}"
    assert tokenizer.decode(prompt_ids(tokenizer, row["prompt"])) == row["prompt"]
    with pytest.raises(PromptError, match="the prompt is empty"):
        prompt_ids(tokenizer, "")


@pytest.mark.parametrize("around", AROUND[1:])
def test_chats_have_the_tokens_that_their_template_writes(around: str) -> None:
    tokenizer = tokenizer_with("{{ bos_token }}" + CHAT_TEMPLATE, around)
    row = chat("a", "b")
    text = rendered(tokenizer, row["messages"], generation_prompt=False)
    assert tokenizer.decode(trained(tokenizer, row).ids) == text.removesuffix("\n")
    assert tokenizer.decode(served(tokenizer, messages=row["messages"][:1])) == text.split("b<")[0]
