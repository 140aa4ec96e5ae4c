"""From generated tokens to text: what can be shown already, and where an answer ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_core.data.prompts import NoTemplateError, PromptError, rendered
from lora_core.inference.tool_calls import overlap
from lora_core.models.base import BaseModel

_INCOMPLETE = "\ufffd"  # what bytes decode to as long as their character is not whole

# The characters that byte-level tokenizers write for bytes: those that can be seen are themselves, the others follow.
_SEEN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_UNSEEN = [byte for byte in range(256) if byte not in _SEEN]
_BYTES = {chr(byte): byte for byte in _SEEN} | {chr(256 + index): byte for index, byte in enumerate(_UNSEEN)}


class TextStream:
    """The text of one answer, token by token; joined, it is `tokenizer.decode(tokens)` up to the first stop string.

    Held back: the bytes of an incomplete character, and an end of the text with which a stop string may begin. Each
    piece is decoded together with the one before it, since SentencePiece's spaces depend on what stands to the left.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        assert all(stop)
        self._text_of, self._stop = _text_of(tokenizer), stop
        self._tokens: list[int] = []
        self._before = 0  # start of the piece that was shown last
        self._shown = 0  # end of it
        self._piece = ""  # its text
        self._pending = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take a token and return the text that is certain now; after a stop string (`stopped`) there is no more."""
        self._tokens.append(token)
        text = self._decode(self._before)
        if text.endswith(_INCOMPLETE) or len(text) <= len(self._piece):
            return ""
        new = text[len(self._piece) :]
        self._before, self._shown = self._shown, len(self._tokens)
        self._piece = self._decode(self._before)
        return self._release(new)

    def finish(self) -> str:
        """Return the rest, when the answer ended without a stop string."""
        rest = self._release(self._decode(self._before)[len(self._piece) :])
        if self.stopped:
            return rest
        return rest + self._pending

    def _decode(self, start: int) -> str:
        return self._text_of(self._tokens[start:])

    def _release(self, new: str) -> str:
        pending = self._pending + new
        matches = [(pending.find(stop) + len(stop), pending.find(stop)) for stop in self._stop if stop in pending]
        if matches:  # the stop string that was complete first, however the text was cut into tokens
            self.stopped, self._pending = True, ""
            return pending[: min(matches)[1]]
        keep = max((overlap(pending, stop) for stop in self._stop), default=0)
        self._pending = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]


def _text_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """Return what decodes tokens, special ones left out: straight from `tokenizers` where transformers adds nothing, in
    half of its time.
    """
    own, fast = type(tokenizer), PreTrainedTokenizerFast
    if getattr(own, "_decode", None) is fast._decode and own.decode is fast.decode:
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True)
    return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TokenTexts:
    """What each token says by itself: its text, that of special tokens too, and the bytes that it stands for, which may
    be a part of a character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def __call__(self, token: int) -> tuple[str, bytes]:
        if token not in self._known:
            # Behind another, since SentencePiece drops the space before the first.
            text = self.joined([token, token])[len(self.joined([token])) :]
            self._known[token] = text, self._bytes(token) if _INCOMPLETE in text else text.encode()
        return self._known[token]

    def joined(self, tokens: Sequence[int]) -> str:
        """Return what several say together."""
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def _bytes(self, token: int) -> bytes:
        written = str(self._tokenizer.convert_ids_to_tokens(token))
        if fallback := re.fullmatch("<0x([0-9A-F]{2})>", written):
            return bytes.fromhex(fallback[1])
        return bytes(_BYTES[char] for char in written) if _BYTES.keys() >= set(written) else written.encode()


def end_tokens(base: BaseModel) -> frozenset[int]:
    """Return what ends an answer: tokens of the generation config, the tokenizer and the end of a chat's turn."""
    tokenizer = base.tokenizer
    config = base.model.generation_config
    configured = config.eos_token_id if config is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    ends = {*listed, tokenizer.eos_token_id, _end_of_turn(tokenizer)}
    return frozenset(token for token in ends if isinstance(token, int))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Find the special token that the chat template puts behind an answer; many bases name only another as EOS."""
    said = "What the assistant says."
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": said}]
    try:
        _, found, after = rendered(tokenizer, messages, generation_prompt=False).rpartition(said)
    except (NoTemplateError, PromptError):  # plain prompts can be served all the same
        return None
    if not found:
        return None
    after = after.lstrip()
    specials = {token: content for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return next((token for token, content in specials.items() if after.startswith(content.content)), None)
