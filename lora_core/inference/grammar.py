"""Answers that follow a grammar: which tokens may come next, as llguidance works it out on the CPU in between.

grammar = GrammarCompiler(tokenizer, ...).json(schema)
state = grammar.start()                            one of each answer
state.allowed()                                    a mask of the vocabulary, for the next token
state.accept(token)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_core.inference.tool_calls import CLOSE, OPEN, CallFormat

_WHITESPACE = r"[ \n\r\t]{1,40}"  # between the parts of JSON: a small model that may go on for ever does
_SAID = 300


class GrammarError(ValueError):
    """A grammar, or a schema, that no answer can follow here; some become too large only while an answer grows."""


class GrammarState:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: LLMatcher, rows: int) -> None:
        self._matcher, self._rows = matcher, rows

    def allowed(self) -> Tensor:
        """bool `[rows]` on CPU: the tokens that may come next, end tokens among them; none after an error."""
        return torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)[: self._rows] != 0

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        self._matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> GrammarError | None:
        """Why the answer cannot go on."""
        if not self._matcher.is_error():
            return None
        return GrammarError(f"the answer cannot go on in its format ({_reason(self._matcher)}); use a simpler one")


class Grammar:
    """A grammar that any number of answers follow."""

    def __init__(self, matcher: LLMatcher, rows: int) -> None:
        self._matcher, self._rows = matcher, rows

    def start(self) -> GrammarState:
        return GrammarState(self._matcher.deep_copy(), self._rows)


class GrammarCompiler:
    """Makes grammars over the tokens of one base, whose head has `rows`, and whose answers end with one of `ends`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int, ends: Iterable[int]) -> None:
        self._tokenizer, self._rows, self._ends = tokenizer, rows, sorted(ends)

    def json(self, schema: Mapping[str, Any]) -> Grammar:
        """The JSON documents that a JSON Schema describes.

        Raises:
            GrammarError: it is no schema, none that is supported, or this base's tokenizer cannot be read.
        """
        return self._grammar(
            LLMatcher.grammar_from_json_schema(dict(schema), overrides={"whitespace_pattern": _WHITESPACE})
        )

    def call(self, tools: Mapping[str, Mapping[str, Any]], form: CallFormat) -> Grammar:
        """A call of one of these tools, which are the JSON Schemas of their arguments by name.

        Raises:
            GrammarError: as above.
        """
        before, behind = (f"{OPEN}\n", f"\n{CLOSE}") if form.tagged else ("", "")
        rules = ["start: " + " | ".join(f"call_{index}" for index in range(len(tools)))]
        for index, (name, schema) in enumerate(tools.items()):
            begin = f'{before}{{"name": {json.dumps(name)}, "{form.key}": '
            rules.append(f"call_{index}: {json.dumps(begin)} arguments_{index} {json.dumps('}' + behind)}")
            options = {"x-guidance": {"whitespace_pattern": _WHITESPACE}}
            rules.append(f"arguments_{index}: %json {json.dumps({'type': 'object', **schema, **options})}")
        return self._grammar(LLMatcher.grammar_from_lark("\n".join(rules)))

    def _grammar(self, grammar: str) -> Grammar:
        matcher = LLMatcher(self._trie, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise GrammarError(
                f"no answer can follow the JSON Schema here ({_reason(matcher)}); change that part of it"
            )
        return Grammar(matcher, self._rows)

    @cached_property
    def _trie(self) -> LLTokenizer:
        """All tokens by their bytes, which takes a second where there are many."""
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            raise GrammarError("this base model's tokenizer cannot be followed token by token")
        try:
            return LLTokenizer(
                self._tokenizer.backend_tokenizer.to_str(),
                n_vocab=max(self._rows, len(self._tokenizer)),
                eos_token=self._ends or None,
            )
        except ValueError as error:
            raise GrammarError(f"this base model's tokenizer cannot be followed token by token ({error})") from error


def _reason(matcher: LLMatcher) -> str:
    return " ".join(matcher.get_error().split())[:_SAID]
