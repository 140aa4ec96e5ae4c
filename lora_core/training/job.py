"""What one job is to the engine: its settings and rows, which of them make up each step, and where it stands."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.dropout import mix64
from lora_core.config import LoraConfig, TrainConfig
from lora_core.data.dataset import Example
from lora_core.data.packing import PAD_TO_MULTIPLE_OF
from lora_core.training.optimizer import Evaluation, StepOutcome

CHUNK_TOKENS = 1024

GRADIENT_CHECK_TOKENS = 16
"""Supervised tokens after which a module without a gradient is one that the model does not use."""


@dataclass(frozen=True)
class EngineJob:
    """What to train: a name that is unique in the engine, the adapter, how, and the examples to train and to validate
    on (all of them, on every rank). With `init_adapter` training starts from what that adapter computes (see
    `continued_adapter`). Where training is of preferences, two examples side by side are a pair, the preferred first.
    After `until` steps (None: all) it is evaluated and waits; what it is then goes on, in another job, to a later step.
    """

    name: str
    lora: LoraConfig
    train: TrainConfig
    examples: Sequence[Example]
    validation: Sequence[Example] = ()
    init_adapter: Adapter | None = None
    until: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch takes what is left; its loss is divided by its own tokens, so it is no special
        case.
        """
        return math.ceil(len(self.examples) / self.documents_of_step)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.train.epochs

    @property
    def last_step(self) -> int:
        """How many of its steps it makes here."""
        return self.steps if self.until is None else min(self.until, self.steps)

    @property
    def documents_of_step(self) -> int:
        """How many examples, or both of each pair, an optimizer step has."""
        return self.train.batch_size * (2 if self.train.is_preference else 1)

    def examples_of(self, step: int) -> list[int]:
        """Indices of the examples of one optimizer step: a fresh permutation every epoch, known from (seed, epoch)
        alone.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        together = 2 if self.train.is_preference else 1
        order = _order(len(self.examples) // together, self.train.seed, epoch)
        part = order[within * self.train.batch_size : (within + 1) * self.train.batch_size]
        indices: list[int] = (part[:, None] * together + torch.arange(together)).flatten().tolist()
        return indices

    @property
    def has_reference_adapter(self) -> bool:
        """Whether its pairs are scored with the adapter that it starts from, rather than with the base alone."""
        return self.train.is_preference and self.init_adapter is not None

    @property
    def chunk_limit(self) -> int:
        """Tokens of a chunk. It depends on the job alone, whatever fits into a micro-batch (see `packing.py`). Of pairs
        each document has a weight of its own, and so is a chunk by itself.
        """
        return 0 if self.train.is_preference else max(CHUNK_TOKENS, self.train.max_seq_len)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest example, validation ones included."""
        return max(len(example.ids) for example in (*self.examples, *self.validation))

    @cached_property
    def largest_chunk(self) -> int:
        """Tokens that no chunk of any step or evaluation exceeds."""
        largest = 0
        for examples, count in ((self.examples, self.documents_of_step), (self.validation, len(self.validation))):
            lengths = sorted((len(example.ids) for example in examples), reverse=True)
            if lengths:
                largest = max(largest, lengths[0], min(self.chunk_limit, sum(lengths[:count])))
        return largest + -largest % PAD_TO_MULTIPLE_OF

    @cached_property
    def gradient_check_step(self) -> int | None:
        """The step by whose end every module must have had a gradient, if there is one. A label that follows a single
        token does not count: that token sees itself alone, which rightly leaves q and k without one.
        """
        seen = 0
        for step in range(self.steps):
            seen += sum(sum(self.examples[index].labels_mask[2:]) for index in self.examples_of(step))
            if seen >= GRADIENT_CHECK_TOKENS:
                return step
            if not seen and step + 1 == self.steps_per_epoch:
                break  # there are none
        return None

    def evaluates_after(self, step: int) -> bool:
        """Whether the validation examples are evaluated once `step` steps are done: before the first, at the end, every
        `eval_steps` or every epoch, and where it waits.
        """
        every = self.train.eval_steps or self.steps_per_epoch
        return bool(self.validation) and (step % every == 0 or step >= self.steps or step == self.until)

    def problems(self) -> list[str]:
        """Why it cannot be trained as it is, one sentence each."""
        problems = []
        if not self.examples:
            problems.append(f"{self.name} has no examples to train on")
        if self.train.is_preference and (len(self.examples) % 2 or len(self.validation) % 2):
            problems.append(f"{self.name} has an example without another one, and method dpo learns from pairs")
        if self.train.needs_validation and not self.validation:
            options = " and ".join(self.train.needs_validation)
            problems.append(f"{self.name} has no validation examples, which {options} would judge by: give some")
        if self.validation and not any(any(example.labels_mask) for example in self.validation):
            problems.append(f"{self.name}: none of the validation examples has a supervised token: give others")
        return problems

    @cached_property
    def digest(self) -> str:
        """What a checkpoint must agree on to be continued: the adapter's and training's configuration, where it starts,
        and every example.
        """
        digest = hashlib.sha256(f"{self.lora.model_dump_json()}{self.train.model_dump_json()}".encode())
        for examples in (self.examples, self.validation):
            digest.update(array("q", [len(examples)]).tobytes())
            for example in examples:
                digest.update(array("q", [len(example.ids), *example.ids]).tobytes() + bytes(example.labels_mask))
        if self.init_adapter is not None:
            given = self.init_adapter
            for name, weight in (*given.a.items(), *given.b.items(), *given.magnitude.items()):
                digest.update(f"{name} {given.scale[name]}".encode() + weight.cpu().numpy().tobytes())
        return digest.hexdigest()


@dataclass
class Progress:
    """Where a job stands, all that resuming it needs beside its optimizer.

    `tokens` and `supervised_tokens` count over all ranks and steps. `outcome` is the last step's; `before` the
    evaluation of what it started from, which does not count as the best; `misses` the evaluations since the best.
    `stopped` says why it ended early; `guessing` counts the last steps in a row whose loss was worse than the first and
    at chance level, that of all tokens being as probable.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    first_loss: float = math.nan
    loss: float = math.nan
    outcome: StepOutcome | None = None
    before: Evaluation | None = None
    evaluation: Evaluation | None = None
    best: Evaluation | None = None
    misses: int = 0
    stopped: str | None = None
    guessing: int = 0

    def stepped(self, outcome: StepOutcome, tokens: int, vocabulary: int) -> None:
        """Count one optimizer step over `tokens` tokens of a model that chooses from `vocabulary`."""
        self.step += 1
        self.tokens += tokens
        self.supervised_tokens += outcome.tokens
        if outcome.tokens:
            self.loss = outcome.loss
            if math.isnan(self.first_loss):
                self.first_loss = outcome.loss
            at_chance = outcome.loss > self.first_loss and outcome.loss > 0.99 * math.log(vocabulary)
            self.guessing = self.guessing + 1 if at_chance else 0
        self.outcome = outcome

    @property
    def diverged(self) -> str | None:
        """Why there is no use in going on, if there is none."""
        if self.guessing < CHANCE_LEVEL_STEPS:
            return None
        return (
            f"the loss was no better than chance for {CHANCE_LEVEL_STEPS} steps ({self.loss:.2f},"
            f" {self.first_loss:.2f} at the first): lower learning_rate"
        )

    def evaluated(self, evaluation: Evaluation, patience: int | None) -> bool:
        """Take an evaluation in; whether it is the best so far."""
        self.evaluation = evaluation
        if self.step == 0:
            self.before = evaluation
            return False
        assert self.outcome is not None
        self.outcome = replace(self.outcome, evaluation=evaluation)
        if self.best is None or evaluation.loss < self.best.loss:
            self.best, self.misses = evaluation, 0
            return True
        self.misses += 1
        if patience is not None and self.misses >= patience:
            self.stopped = (
                f"stopped early after step {self.step}: the validation loss did not improve in {self.misses}"
                f" evaluation{'s' if self.misses > 1 else ''}; it was lowest, {self.best.loss:.4f}, after step"
                f" {self.best.step}"
            )
        return False

    def to_json(self) -> str:
        """`from_json` reads it back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Progress:
        """What `to_json` wrote."""
        values = json.loads(text)
        for name in ("before", "evaluation", "best"):
            values[name] = _evaluation(values[name])
        if (outcome := values["outcome"]) is not None:
            values["outcome"] = StepOutcome(**outcome | {"evaluation": _evaluation(outcome["evaluation"])})
        return cls(**values)


def _evaluation(values: dict[str, float] | None) -> Evaluation | None:
    return None if values is None else Evaluation(**values)  # type: ignore[arg-type]


CHANCE_LEVEL_STEPS = 20
"""Steps in a row that end a job: a loss that was no better than chance for so long does not come back by itself."""

NOT_FINITE = "the loss or its gradient was not finite: lower learning_rate, or look at the rows of that step"
VALIDATION_NOT_FINITE = "the validation loss was not finite: lower learning_rate, or look at the validation rows"


class JobDiverged(ValueError):  # noqa: N818 - the outcome of a step before it is an error
    """A job that cannot go on. Where something was not finite, its adapter is as it was before that step."""

    def __init__(self, job: str, step: int, reason: str = NOT_FINITE) -> None:
        super().__init__(job, step, reason)
        self.job, self.step, self.reason = job, step, reason

    def __str__(self) -> str:
        return f"step {self.step}: {self.reason}"


@lru_cache(maxsize=64)  # one epoch of each job that is live, give or take
def _order(examples: int, seed: int, epoch: int) -> Tensor:
    mixed = int(mix64(mix64(torch.tensor(seed)) + epoch))
    return torch.randperm(examples, generator=torch.Generator().manual_seed(mixed & (2**63 - 1)))
