"""From generated tokens to what is sent of them: the choices of one request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from deploy.serving.decode_loop import ChoiceToken
from deploy.serving.protocol import Delta, GenerateRequest, TokenLogprob
from lora_core.inference.detokenizer import TokenTexts
from lora_core.inference.engine import GeneratedToken
from lora_core.inference.logprobs import TokenLogprob as ScoredToken


class Choices:
    """The answers to `asked`, whose prompt are the tokens `prompt`."""

    def __init__(self, asked: GenerateRequest, prompt: Sequence[int], texts: TokenTexts) -> None:
        self._asked, self._prompt, self._texts = asked, prompt, texts
        self._echoed = not asked.echo

    def deltas(self, batch: Sequence[ChoiceToken]) -> Iterator[Delta]:
        """Yield what is new with these tokens. The first of all, of the first choice, bring the prompt's scores."""
        if not self._echoed:
            self._echoed = True
            assert isinstance(self._asked.prompt, str)
            logprobs = self._of_prompt(batch[0][1].prompt_logprobs) if self._asked.logprobs is not None else ()
            for index in range(self._asked.n):
                yield Delta(self._asked.prompt, None, 0, index, logprobs)
        of_choices: dict[int, list[GeneratedToken]] = {}
        for index, token in batch:
            of_choices.setdefault(index, []).append(token)
        for index, tokens in of_choices.items():
            text, last = "".join(token.text for token in tokens), tokens[-1]
            logprobs = tuple(self._shown(token.logprob) for token in tokens if token.logprob is not None)
            if text or logprobs or last.finish_reason is not None:
                yield Delta(text, last.finish_reason, last.completion_tokens, index, logprobs)

    def _of_prompt(self, scored: Iterable[ScoredToken]) -> tuple[TokenLogprob, ...]:
        first = TokenLogprob(*self._texts(self._prompt[0]), None)
        return first, *map(self._shown, scored)

    def _shown(self, scored: ScoredToken) -> TokenLogprob:
        top = tuple(TokenLogprob(*self._texts(token), logprob) for token, logprob in scored.top)
        return TokenLogprob(*self._texts(scored.token), scored.logprob, top)


def joined(deltas: Sequence[Delta]) -> Delta:
    """Join the deltas of one choice."""
    last = deltas[-1]
    text, logprobs = "".join(delta.text for delta in deltas), chain.from_iterable(delta.logprobs for delta in deltas)
    return Delta(text, last.finish_reason, last.completion_tokens, last.index, tuple(logprobs))
