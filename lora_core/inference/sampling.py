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
        self._stream = torch.Generator()
        if params.seed is None:
            self._stream.seed()
        else:
            self._stream.manual_seed(params.seed)

    def uniform(self) -> float:
        """Draw the next number of the stream, in [0, 1)."""
        return float(torch.rand((), dtype=torch.float64, generator=self._stream))

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

    @property
    def waits(self) -> bool:
        """Whether a token is chosen by the one before, or by looking at what the device has found."""
        return self.adjusts or not (self.params.greedy or 0 < self.params.top_k <= _LIKELY)

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


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Choose token ids int64 `[n]` by logits `[n, vocabulary]` and a sampler for each row, which is to `accept` its own
    when it is known.
    """
    if adjusted := [row for row, sampler in enumerate(samplers) if sampler.adjusts]:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        for row in adjusted:
            logits[row] = samplers[row].adjusted(logits[row])
    tokens = logits.argmax(-1)
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.params.greedy]
    if drawn:
        params = [samplers[row].params for row in drawn]
        most = [of_row.top_k if of_row.top_k > 0 else logits.shape[1] for of_row in params]
        numbers = [
            (of_row.temperature, of_row.top_p, of_row.min_p, k, samplers[row].uniform())
            for row, of_row, k in zip(drawn, params, most, strict=True)
        ]
        rows = to_device(torch.tensor(drawn), logits.device)
        temperature, *rules = to_device(torch.tensor(numbers, dtype=torch.float64), logits.device).split(1, dim=1)
        surely = max(most) <= _LIKELY
        tokens[rows] = _draw(logits[rows].float() / temperature.float(), *rules, surely=surely)
    return tokens


def _draw(logits: Tensor, *rules: Tensor, surely: bool) -> Tensor:
    """Draw token ids `[n]` by scaled logits `[n, vocabulary]`; top_p, min_p, top_k and uniform float64 `[n, 1]`. What
    they leave is `surely` among the likely ones.
    """
    probabilities = torch.softmax(logits, dim=-1)
    total = probabilities.double().sum(-1, keepdim=True)
    values, order = probabilities.topk(min(_LIKELY, logits.shape[-1]))
    index, found = _invert(values, total, *rules)
    tokens = order.gather(-1, index)
    if not surely and not found.all():
        rest = ~found[:, 0]
        values, order = probabilities[rest].sort(dim=-1, descending=True)
        index, _ = _invert(values, total[rest], *(rule[rest] for rule in rules))
        tokens[rest] = order.gather(-1, index)
    return tokens[:, 0]


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
