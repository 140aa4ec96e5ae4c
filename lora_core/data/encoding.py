"""One row -> token ids and loss mask, such that what is trained is what will be served.

For a conversation m and each answer m[i] of the assistant, with ids(.) the tokens of what the chat template renders:

    prompt = ids(render(m[:i], add_generation_prompt=True))       what the server feeds
    turn   = ids(render(m[:i+1])) up to its end-of-turn token     with what the model has to produce behind it

turn must start with prompt, token by token; the labels are the rest of it. Most templates cannot mark the assistant's
tokens themselves, so this is how the mask is found. Turns of which each starts with the one before share one example;
where the template rewrites history (Qwen3 takes <think> out of earlier turns), a turn gets an example of its own.

What the template puts between generation prompt and answer (Qwen3's empty <think> block) is a label: the server does
not feed it, so the model has to say it. What it puts behind the end-of-turn token (ChatML's newline) is none: the
server stops there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lora_core.data.format import (
    PREFERENCES,
    REQUIRED_COLUMNS,
    DatasetError,
    NumberedRow,
    Row,
    RowFormat,
    location,
)
from lora_core.data.preferences import completions, tools_of
from lora_core.data.prompts import NoTemplateError, PromptError, rendered, text_ids, tokenised
from lora_core.data.sharegpt import conversation

TrainOn = Literal["completion", "all"]

BATCH_ROWS = 256  # tokenised together: enough for the tokenizer's threads; the ids of all turns are held only this long

# Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca#data-release; for a tokenizer without a chat template.
ALPACA_TASK = "Below is an instruction that describes a task"
ALPACA_WITH_INPUT = ", paired with an input that provides further context"
ALPACA_REQUEST = ". Write a response that appropriately completes the request.\n\n"


@dataclass(frozen=True)
class Example:
    """One document. `labels_mask[t]`: token t is a label, predicted from the tokens before it; never True at 0."""

    ids: list[int]
    labels_mask: list[bool]


@dataclass(frozen=True)
class _Passage:
    """What the server feeds, and what the model has to produce behind it: rendered by the chat template, or plain."""

    line: int
    prompt: str
    answer: str
    rendered: bool

    @property
    def whole(self) -> str:
        return self.prompt + self.answer


@dataclass(frozen=True)
class _EncodedTurn:
    """The same in tokens: the first `prompt` of `ids` are what the server feeds."""

    line: int
    prompt: int
    ids: list[int]


def encode_pairs(
    rows: Sequence[NumberedRow], row_format: RowFormat, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, list[Example]]]:
    """Encode every row of preferences: its line, and its preferred and its other answer, each behind the prompt. A row
    one of whose answers has no label is left out.

    Raises:
        DatasetError: what `encode_rows` finds, and answers that are no single document.
    """
    sides: list[dict[int, list[Example]]] = [{}, {}]
    problems: dict[str, None] = {}
    columns = REQUIRED_COLUMNS[row_format][-2:]
    for number, (side, column) in enumerate(zip(sides, columns, strict=True)):
        try:
            for line, example in encode_rows(rows, row_format, tokenizer, "completion", answer=number):
                side.setdefault(line, []).append(example)
        except DatasetError as error:
            problems |= dict.fromkeys(error.problems)
        rewritten = [line for line, examples in side.items() if len(examples) > 1]
        advice = "the chat template rewrites its earlier answers; put all messages but the last one into the prompt"
        problems |= dict.fromkeys(f"{location(line)}: column `{column}`: {advice}" for line in rewritten)
    if problems:
        raise DatasetError([*problems])
    return [(line, [*sides[0][line], *sides[1][line]]) for line, _ in rows if line in sides[0] and line in sides[1]]


def encode_rows(
    rows: Sequence[NumberedRow],
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    train_on: TrainOn,
    answer: int = 0,
) -> list[tuple[int, Example]]:
    """Encode every row: (line, example) in order, each ending with a label; a row may have several examples, or none.
    Of preferences, the preferred `answer` is 0 and the other one 1.

    Labels are answers, completions and texts. With `train_on="all"` every token but a document's first is one, and a
    conversation, up to its last answer, is rendered once.

    Raises:
        DatasetError: rows that the chat template refuses; a tokenizer without chat template or end of sequence.
    """
    problems: list[str] = []
    encoded: list[tuple[int, Example]] = []
    for start in range(0, len(rows), BATCH_ROWS):
        passages: list[_Passage] = []
        for line, row in rows[start : start + BATCH_ROWS]:
            try:
                tools: Sequence[Row] = []
                if row_format in PREFERENCES:
                    tools, row = tools_of(row), completions(row)[answer]
                passages += _passages(line, row, row_format, tokenizer, train_on, tools)
            except PromptError as error:
                columns = ", ".join(f"`{column}`" for column in REQUIRED_COLUMNS[row_format])
                problems.append(f"{location(line)}: column {columns}: {error}; change or leave out the row")
            except NoTemplateError as error:
                strings = "`chosen` and `rejected`" if row_format in PREFERENCES else "`prompt` and `completion`"
                advice = f"use rows of {strings} strings, or an instruct model"
                raise DatasetError([f"{error}; {advice}"]) from error
        encoded += [(turns[-1].line, _example(turns, train_on)) for turns in _grouped(_turns(passages, tokenizer))]
    if problems:
        raise DatasetError(problems)
    return encoded


def _passages(
    line: int,
    row: Row,
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    train_on: TrainOn,
    tools: Sequence[Row],
) -> list[_Passage]:
    """Make one text for each answer to learn of a chat, and one of any other row."""
    first = 1  # an opening message of the assistant answers nothing
    if row_format == "messages":
        messages = row["messages"]
    elif row_format == "conversations (ShareGPT)":
        messages = conversation(row["conversations"], row.get("system", ""))
    elif row_format == "text":
        return [_Passage(line, "", row["text"], rendered=False)]
    elif row_format == "instruction/output" and not tokenizer.chat_template:
        return [_Passage(line, _alpaca_prompt(row["instruction"], row.get("input", "")), row["output"], rendered=False)]
    elif row_format == "instruction/output":
        user = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}]
    elif isinstance(row["prompt"], str):
        return [_Passage(line, row["prompt"], row["completion"], rendered=False)]
    else:
        messages, first = [*row["prompt"], *row["completion"]], max(first, len(row["prompt"]))
    said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "all":
        whole = rendered(tokenizer, messages[: said[-1] + 1], generation_prompt=False)
        return [_Passage(line, "", whole, rendered=True)]
    answers = [index for index in said if index >= first and messages[index].get("weight") != 0]
    return [
        _Passage(line, *_prompt_and_answer(tokenizer, messages, index, number, tools), rendered=True)
        for number, index in enumerate(answers, start=1)
    ]


def _alpaca_prompt(instruction: str, given: str) -> str:
    task = f"{ALPACA_TASK}{ALPACA_WITH_INPUT if given else ''}{ALPACA_REQUEST}### Instruction:\n{instruction}\n\n"
    return task + (f"### Input:\n{given}\n\n" if given else "") + "### Response:\n"


def _prompt_and_answer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Row], index: int, number: int, tools: Sequence[Row]
) -> tuple[str, str]:
    """Render the prompt of answer `number`, the message at `index`, and what the template makes of the answer."""
    for _ in range(2):  # a template with a clock may have read two times
        prompt = rendered(tokenizer, messages[:index], generation_prompt=True, tools=tools)
        whole = rendered(tokenizer, messages[: index + 1], generation_prompt=False, tools=tools)
        if whole.startswith(prompt):
            return prompt, whole[len(prompt) :]
    raise PromptError(
        f"the chat template puts answer {number} behind another prompt than the one it is served with;"
        " use `prompt` and `completion` strings"
    )


def _turns(passages: Sequence[_Passage], tokenizer: PreTrainedTokenizerBase) -> list[_EncodedTurn]:
    """Tokenise each text, in the order of lines: the prompt as the server feeds it, the answer, one end."""
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    turns: list[_EncodedTurn] = []
    for is_rendered, ids_of in ((True, tokenised), (False, text_ids)):
        # One row's prompt may be a chat, and another's not.
        own = [passage for passage in passages if passage.rendered is is_rendered]
        prompts = ids_of(tokenizer, [passage.prompt for passage in own])
        wholes = ids_of(tokenizer, [passage.whole for passage in own])
        for passage, prompt, whole in zip(own, prompts, wholes, strict=True):
            ids = _starting_with(prompt, whole, passage.answer, tokenizer)
            if is_rendered:
                ids = _until_end_of_turn(ids, len(prompt), special, tokenizer)
            else:
                ids = _with_one_end(ids, len(prompt), tokenizer)
            turns.append(_EncodedTurn(passage.line, len(prompt), ids))
    return sorted(turns, key=lambda turn: turn.line)


def _grouped(turns: Sequence[_EncodedTurn]) -> Iterator[list[_EncodedTurn]]:
    """Group turns side by side of which each starts with the one before: they are one example."""
    group: list[_EncodedTurn] = []
    for turn in turns:
        if group and (turn.line != group[-1].line or turn.ids[: len(group[-1].ids)] != group[-1].ids):
            yield group
            group = []
        group.append(turn)
    if group:
        yield group


def _example(turns: Sequence[_EncodedTurn], train_on: TrainOn) -> Example:
    ids = turns[-1].ids
    mask = [train_on == "all"] * len(ids)
    for turn in turns:
        mask[turn.prompt : len(turn.ids)] = [True] * (len(turn.ids) - turn.prompt)
    mask[0] = False
    return Example(ids, mask)


def _starting_with(prompt: list[int], whole: list[int], rest: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return `whole` if it starts with `prompt`; else (a token spans the boundary) join the prompt and `rest`'s ids."""
    if whole[: len(prompt)] == prompt:
        return whole
    # Apart, but behind some other text: SentencePiece-like tokenizers put a space before a text's first word.
    for mark in ("\n", "."):
        mark_ids, marked = tokenised(tokenizer, [mark, mark + rest])
        if marked[: len(mark_ids)] == mark_ids:
            return prompt + marked[len(mark_ids) :]
    return prompt + tokenised(tokenizer, [rest])[0]


def _until_end_of_turn(ids: list[int], start: int, special: set[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return ids up to the special token that ends the turn; with end of text without one, or no answer would end."""
    end = len(ids)
    while end > start and ids[end - 1] not in special:
        end -= 1
    if end == start or str(tokenizer.decode(ids[end:])).strip():
        return [*ids, _end_of_text(tokenizer)]
    return ids[:end]


def _with_one_end(ids: list[int], start: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end_of_text, end = _end_of_text(tokenizer), len(ids)
    while end > start and ids[end - 1] == end_of_text:
        end -= 1
    return [*ids[:end], end_of_text]


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DatasetError(["the base model's tokenizer has no eos_token, so no answer would end; choose another base"])
    return int(tokenizer.eos_token_id)
