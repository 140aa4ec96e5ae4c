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

from lora_core.data.format import DatasetError, NumberedRow, Row, RowFormat, place
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
    """`completion` follows `prompt` as plain text."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True)
class _Chat:
    """`answers` are the indices of the messages to learn, ascending; `columns` is where the messages come from."""

    line: int
    columns: str
    messages: list[Row]
    answers: list[int]


@dataclass(frozen=True)
class _Turn:
    """The first `prompt` of `ids` are what the server feeds, the others what the model has to produce."""

    line: int
    prompt: int
    ids: list[int]


def encode_rows(
    rows: Sequence[NumberedRow], row_format: RowFormat, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn
) -> list[tuple[int, Example]]:
    """(line, example) of every row, in order, each ending with a label; a row may have several examples, or none.

    Labels are answers, completions and texts. With `train_on="all"` every token but a document's first is one, and a
    conversation, up to its last answer, is rendered once.

    Raises:
        DatasetError: rows that the chat template refuses; a tokenizer without chat template or end of sequence.
    """
    documents = [_document(line, row, row_format, bool(tokenizer.chat_template)) for line, row in rows]
    passages = [document for document in documents if isinstance(document, _Passage)]
    chats = [document for document in documents if isinstance(document, _Chat)]
    try:
        encoded = [*_encoded_passages(passages, tokenizer), *_encoded_chats(chats, tokenizer, train_on)]
    except NoTemplateError as error:
        advice = "use rows of `prompt` and `completion` strings, or an instruct model"
        raise DatasetError([f"{error}; {advice}"]) from error
    encoded.sort(key=lambda item: item[0])  # prompt/completion may be strings in one row and messages in another
    if train_on == "all":
        encoded = [(line, Example(example.ids, [True] * len(example.ids))) for line, example in encoded]
    return [(line, Example(example.ids, [False, *example.labels_mask[1:]])) for line, example in encoded]


def _document(line: int, row: Row, row_format: RowFormat, has_template: bool) -> _Passage | _Chat:
    if row_format == "messages":
        return _chat(line, "`messages`", row["messages"], 1)  # an opening message of the assistant answers nothing
    if row_format == "conversations (ShareGPT)":
        return _chat(line, "`conversations`", conversation(row["conversations"], row.get("system", "")), 1)
    if row_format == "text":
        return _Passage(line, "", row["text"])
    if row_format == "instruction/output":
        return _alpaca(line, row["instruction"], row.get("input", ""), row["output"], has_template)
    if isinstance(row["prompt"], list):
        messages = [*row["prompt"], *row["completion"]]
        return _chat(line, "`prompt`, `completion`", messages, len(row["prompt"]))
    return _Passage(line, row["prompt"], row["completion"])


def _chat(line: int, columns: str, messages: Sequence[Row], answers_from: int) -> _Chat:
    answers = [
        index
        for index, message in enumerate(messages)
        if index >= answers_from and message["role"] == "assistant" and message.get("weight") != 0
    ]
    return _Chat(line, columns, list(messages), answers)


def _alpaca(line: int, instruction: str, given: str, output: str, has_template: bool) -> _Passage | _Chat:
    if has_template:
        user = f"{instruction}\n\n{given}" if given else instruction
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": output}]
        return _chat(line, "`instruction`, `output`", messages, 1)
    prompt = f"{ALPACA_TASK}{ALPACA_WITH_INPUT if given else ''}{ALPACA_REQUEST}### Instruction:\n{instruction}\n\n"
    return _Passage(line, prompt + (f"### Input:\n{given}\n\n" if given else "") + "### Response:\n", output)


def _encoded_passages(
    passages: Sequence[_Passage], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, Example]]:
    """The prompt as the server feeds it (with the tokenizer's own first token, if it has one), completion, one end."""
    for start in range(0, len(passages), BATCH_ROWS):
        batch = passages[start : start + BATCH_ROWS]
        prompts = text_ids(tokenizer, [passage.prompt for passage in batch])
        wholes = text_ids(tokenizer, [passage.prompt + passage.completion for passage in batch])
        for passage, prompt, whole in zip(batch, prompts, wholes, strict=True):
            ids = _starting_with(prompt, whole, passage.completion, tokenizer)
            while len(ids) > len(prompt) and ids[-1] == _end_of_text(tokenizer):
                ids = ids[:-1]
            ids = [*ids, _end_of_text(tokenizer)]
            yield passage.line, _example([_Turn(passage.line, len(prompt), ids)])


def _encoded_chats(
    chats: Sequence[_Chat], tokenizer: PreTrainedTokenizerBase, train_on: TrainOn
) -> Iterator[tuple[int, Example]]:
    """One example for a run of turns of which each starts with the one before."""
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    for texts in _rendered_batches(chats, tokenizer, train_on):
        prompts = tokenised(tokenizer, [prompt for _, prompt, _ in texts])
        wholes = tokenised(tokenizer, [whole for _, _, whole in texts])
        run: list[_Turn] = []
        for (line, prompt, whole), prompt_ids, whole_ids in zip(texts, prompts, wholes, strict=True):
            ids = _starting_with(prompt_ids, whole_ids, whole[len(prompt) :], tokenizer)
            turn = _Turn(line, len(prompt_ids), _until_end_of_turn(ids, len(prompt_ids), special, tokenizer))
            if run and (line != run[-1].line or turn.ids[: len(run[-1].ids)] != run[-1].ids):
                yield run[-1].line, _example(run)
                run = []
            run.append(turn)
        if run:
            yield run[-1].line, _example(run)


def _example(run: Sequence[_Turn]) -> Example:
    ids = run[-1].ids
    mask = [False] * len(ids)
    for turn in run:
        mask[turn.prompt : len(turn.ids)] = [True] * (len(turn.ids) - turn.prompt)
    return Example(ids, mask)


def _rendered_batches(
    chats: Sequence[_Chat], tokenizer: PreTrainedTokenizerBase, train_on: TrainOn
) -> Iterator[list[tuple[int, str, str]]]:
    """(line, prompt, prompt and turn) of every turn to learn, some conversations at a time; raises after the last."""
    problems: list[str] = []
    for start in range(0, len(chats), BATCH_ROWS):
        texts: list[tuple[int, str, str]] = []
        for chat in chats[start : start + BATCH_ROWS]:
            try:
                texts += _rendered(chat, tokenizer, train_on)
            except PromptError as error:
                problems.append(f"{place(chat.line)}: column {chat.columns}: {error}; change or leave out the row")
        yield texts
    if problems:
        raise DatasetError(problems)


def _rendered(chat: _Chat, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn) -> list[tuple[int, str, str]]:
    if train_on == "all":
        end = max(index for index, message in enumerate(chat.messages) if message["role"] == "assistant") + 1
        return [(chat.line, "", rendered(tokenizer, chat.messages[:end], generation_prompt=False))]
    return [(chat.line, *_turn(tokenizer, chat, number)) for number in range(len(chat.answers))]


def _turn(tokenizer: PreTrainedTokenizerBase, chat: _Chat, number: int) -> tuple[str, str]:
    """The prompt of an answer, and the prompt and the answer."""
    index = chat.answers[number]
    for _ in range(2):  # a template with a clock may have read two times
        prompt = rendered(tokenizer, chat.messages[:index], generation_prompt=True)
        whole = rendered(tokenizer, chat.messages[: index + 1], generation_prompt=False)
        if whole.startswith(prompt):
            return prompt, whole
    raise PromptError(
        f"the chat template puts answer {number + 1} behind another prompt than the one it is served with;"
        " use `prompt` and `completion` strings"
    )


def _starting_with(prompt: list[int], whole: list[int], rest: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`whole` if it starts with `prompt`; else (a token spans the boundary) the prompt and `rest`, tokenised apart."""
    if whole[: len(prompt)] == prompt:
        return whole
    # Apart, but behind some other text: SentencePiece-like tokenizers put a space before a text's first word.
    for mark in ("\n", "."):
        mark_ids, marked = tokenised(tokenizer, [mark, mark + rest])
        if marked[: len(mark_ids)] == mark_ids:
            return prompt + marked[len(mark_ids) :]
    return prompt + tokenised(tokenizer, [rest])[0]


def _until_end_of_turn(ids: list[int], start: int, special: set[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Up to the special token that ends the turn; with end of text where there is none, or no answer would end."""
    end = len(ids)
    while end > start and ids[end - 1] not in special:
        end -= 1
    if end == start or str(tokenizer.decode(ids[end:])).strip():
        return [*ids, _end_of_text(tokenizer)]
    return ids[:end]


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DatasetError(["the base model's tokenizer has no eos_token, so no answer would end; choose another base"])
    return int(tokenizer.eos_token_id)
