"""From generated tokens to what is sent of them: the choices of one request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from deploy.serving.decode_loop import ChoiceToken
from deploy.serving.protocol import Delta, GenerateRequest, TokenLogprob
from lora_core.inference.detokenizer import TokenTexts
from lora_core.inference.generation import GeneratedToken
from lora_core.inference.logprobs import TokenLogprob as ScoredToken
from lora_core.inference.tool_calls import CallFormat, ToolCall, ToolCallParser


class Choices:
    """The answers to `asked`, whose prompt are the tokens `prompt`; `calls` says how the base calls its tools."""

    def __init__(
        self, asked: GenerateRequest, prompt: Sequence[int], texts: TokenTexts, calls: CallFormat | None
    ) -> None:
        self._asked, self._prompt, self._texts = asked, prompt, texts
        self._echoed = not asked.echo
        names = [tool["function"]["name"] for tool in asked.tools]
        self._parsers = [
            None if calls is None else ToolCallParser(calls, names, parallel=asked.parallel_tool_calls)
            for _ in range(asked.n)
        ]

    def deltas(self, batch: Sequence[ChoiceToken]) -> Iterator[Delta]:
        """Yield what is new with these tokens. The first of all, of the first choice, bring the prompt's scores."""
        if not self._echoed:
            self._echoed = True
            prompt = self._asked.prompt if isinstance(self._asked.prompt, str) else self._texts.joined(self._prompt)
            logprobs = self._of_prompt(batch[0][1].prompt_logprobs) if self._asked.logprobs is not None else ()
            for index in range(self._asked.n):
                yield Delta(prompt, None, 0, index, logprobs)
        of_choices: dict[int, list[GeneratedToken]] = {}
        for index, token in batch:
            of_choices.setdefault(index, []).append(token)
        for index, tokens in of_choices.items():
            last = tokens[-1]
            text, calls = self._parsed(index, "".join(token.text for token in tokens), last.finish_reason is not None)
            logprobs = tuple(self._shown(token.logprob) for token in tokens if token.logprob is not None)
            if text or calls or logprobs or last.finish_reason is not None:
                yield Delta(text, last.finish_reason, last.completion_tokens, index, logprobs, tuple(calls))

    def _parsed(self, index: int, text: str, is_last: bool) -> tuple[str, list[ToolCall]]:
        parser = self._parsers[index]
        if parser is None:
            return text, []
        text, calls = parser.push(text)
        if is_last:
            rest, last_calls = parser.finish()
            return text + rest, calls + last_calls
        return text, calls

    def _of_prompt(self, scored: Iterable[ScoredToken]) -> tuple[TokenLogprob, ...]:
        first = TokenLogprob(*self._texts(self._prompt[0]), None)
        return first, *map(self._shown, scored)

    def _shown(self, scored: ScoredToken) -> TokenLogprob:
        top = tuple(TokenLogprob(*self._texts(token), logprob) for token, logprob in scored.top)
        return TokenLogprob(*self._texts(scored.token), scored.logprob, top)


def joined(deltas: Sequence[Delta]) -> Delta:
    """Join the deltas of one choice."""
    last = deltas[-1]
    return replace(
        last,
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
        tool_calls=tuple(chain.from_iterable(delta.tool_calls for delta in deltas)),
    )
