"""The next token of each request, chosen from its own logits by its own rules.

    z = -inf                                                       of tokens that the grammar does not allow
    z += logit_bias
    z = z / repetition_penalty where z > 0, else z * it            of tokens in the prompt or the answer
    z -= presence_penalty + frequency_penalty * times              of tokens in the answer
    p = softmax(z / temperature), the most likely first
    top_k keeps that many, min_p those of at least min_p times the first, top_p the fewest of what is left that reach
    top_p of its sum
    token = the first one at which the sum of p exceeds u * (sum of what is kept)

u is one uniform number from the request's own generator, so a request with a seed gets the same tokens whoever decodes
beside it, and its k-th token always takes its k-th number. Temperature 0 is argmax and draws nothing. The order of the
rules is vLLM's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.inference.grammar import Grammar
from lora_core.inference.sampling_params import SamplingParams
from lora_core.kernels.transfer import to_device

_LIKELY = 256  # candidates looked at first: to sort 8 x 49,152 logits took 11.6 ms on 2 cores, their top 256 0.4 ms


class Sampler:
    """One request's rules, its random stream, the tokens that its penalties are for, and how far its grammar is."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int] = (), grammar: Grammar | None = None) -> None:
        self.params = params
        self.grammar = None if grammar is None else grammar.start()
        self._answer: Counter[int] = Counter()
        self._seen = set(prompt)
        self._drawn = 0.0
        self._is_back = False
        self._stream = torch.Generator()
        if params.seed is None:
            self._stream.seed()
        else:
            self._stream.manual_seed(params.seed)

    def uniform(self) -> float:
        """Draw the next number of the stream, in [0, 1)."""
        if not self._is_back:
            self._drawn = float(torch.rand((), dtype=torch.float64, generator=self._stream))
        self._is_back = False
        return self._drawn

    def take_back(self) -> None:
        """Have the number that was drawn last be the next one: its token is not used."""
        self._is_back = not self.params.greedy

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        self._answer[token] += 1
        self._seen.add(token)
        if self.grammar is not None:
            self.grammar.accept(token)

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return self.grammar is not None or self.params.adjusts

    def adjusted(self, logits: Tensor) -> Tensor:
        """Logits `[vocabulary]` with mask, bias and penalties, fp32 or wider."""
        params, wide = self.params, logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        if self.grammar is not None:
            wide.masked_fill_(~self.grammar.allowed().to(wide.device), -torch.inf)
        if params.logit_bias:
            tokens, bias = zip(*params.logit_bias.items(), strict=True)
            wide[list(tokens)] += wide.new_tensor(bias)
        if params.repetition_penalty != 1 and self._seen:
            seen = list(self._seen)
            old, penalty = wide[seen], params.repetition_penalty
            wide[seen] = torch.where(old > 0, old / penalty, old * penalty)
        if self._answer:
            times = wide.new_tensor(list(self._answer.values()))
            wide[list(self._answer)] -= params.presence_penalty + params.frequency_penalty * times
        return wide


class Draws(NamedTuple):
    """Draws among the likely tokens of some rows: tokens int64 `[n]`, and whether they are `found`, bool `[n]`."""

    rows: Tensor
    tokens: Tensor
    found: Tensor
    probabilities: Tensor
    total: Tensor
    rules: tuple[Tensor, ...]

    def among_all(self, missing: Tensor) -> Tensor:
        """The tokens of those that are not found, bool `[n]`, drawn among all."""
        values, order = self.probabilities[missing].sort(dim=-1, descending=True)
        index, _ = _invert(values, self.total[missing], *(rule[missing] for rule in self.rules))
        return order.gather(-1, index)[:, 0]


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> tuple[Tensor, Draws | None]:
    """Choose token ids int64 `[n]` by logits `[n, vocabulary]` and a sampler for each row, which is to `accept` its own
    when it is known; and what was drawn, of which some may not be found: see `settled`.
    """
    if adjusted := [row for row, sampler in enumerate(samplers) if sampler.adjusts]:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        for row in adjusted:
            logits[row] = samplers[row].adjusted(logits[row])
    tokens = logits.argmax(-1)
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.params.greedy]
    if not drawn:
        return tokens, None
    params = [samplers[row].params for row in drawn]
    most = [of_row.top_k if of_row.top_k > 0 else logits.shape[1] for of_row in params]
    numbers = [
        (of_row.temperature, of_row.top_p, of_row.min_p, k, samplers[row].uniform())
        for row, of_row, k in zip(drawn, params, most, strict=True)
    ]
    rows = to_device(torch.tensor(drawn), logits.device)
    temperature, *rules = to_device(torch.tensor(numbers, dtype=torch.float64), logits.device).split(1, dim=1)
    draws = _draw(rows, logits[rows].float() / temperature.float(), tuple(rules))
    tokens[rows] = draws.tokens
    return tokens, draws


def settled(tokens: Tensor, draws: Draws | None) -> list[int]:
    """Return the rows whose draws were not found among the likely tokens, and put the right ones into `tokens`."""
    if draws is None or draws.found.all():
        return []
    missing = ~draws.found
    tokens[draws.rows[missing]] = draws.among_all(missing)
    rows: list[int] = draws.rows[missing].tolist()
    return rows


def _draw(rows: Tensor, logits: Tensor, rules: tuple[Tensor, ...]) -> Draws:
    """Draw by scaled logits `[n, vocabulary]`; rules are top_p, min_p, top_k and uniform, float64 `[n, 1]`."""
    probabilities = torch.softmax(logits, dim=-1)
    total = probabilities.double().sum(-1, keepdim=True)
    values, order = probabilities.topk(min(_LIKELY, logits.shape[-1]))
    index, found = _invert(values, total, *rules)
    return Draws(rows, order.gather(-1, index)[:, 0], found[:, 0], probabilities, total, rules)


def _invert(
    values: Tensor, total: Tensor, top_p: Tensor, min_p: Tensor, top_k: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Find where u falls among the k largest probabilities `[n, k]`, and whether they suffice; both `[n, 1]`."""
    sums, k = values.double().cumsum(-1), values.shape[-1]
    likely = (values >= min_p * values[:, :1]).sum(-1, keepdim=True)  # a beginning, as they are sorted
    kept = torch.minimum(torch.where(likely < k, likely.double(), torch.inf), top_k)
    cut = kept <= k  # what top_k and min_p leave ends among them
    total = torch.where(cut, sums.gather(-1, kept.clamp(1, k).long() - 1), total)  # 0 where numbers are not finite
    before = (sums < top_p * total).sum(-1, keepdim=True)  # tokens ahead of the one that reaches top_p
    reached = before < k
    mass = torch.where(reached, sums.gather(-1, before.clamp(max=k - 1)), total)
    index = (sums <= uniform * mass).sum(-1, keepdim=True)
    return index.clamp(max=k - 1), (reached | (top_p == 1)) & (index < k) & (cut | (likely < k) | (min_p == 0))
