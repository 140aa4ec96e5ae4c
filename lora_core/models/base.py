"""Load a base model once, freeze it, and say exactly which one it is.

A source is a Hugging Face hub id, a local directory or a GGUF file (an `s3://` prefix is fetched into a directory by
whoever has the storage). On CPU the weights are memory-mapped from one safetensors file in the precision that is
computed in, so that every process on a node shares one physical copy; a source in another form is converted into that
file once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lora_core.adapters.targets import adaptable_linears, in_and_out
from lora_core.kernels.operands import NO_ADAPTER
from lora_core.models.attention import ATTENTION_NAME, Attend, DocumentAttention, PackedAttention
from lora_core.models.checks import SUPPORTED, BaseModelError, moving_positions
from lora_core.models.exactness import ask_for_exact_products
from lora_core.models.fastest_precision import Choice, fastest_precision
from lora_core.models.files import (
    DTYPES,
    dense_folder,
    fingerprint_of,
    load_tokenizer,
    local_folder,
    open_model,
    readable,
)
from lora_core.models.llama.decoder import Decoder, DecoderInput
from lora_core.models.precision import (
    QUANTISED,
    DenseWeight,
    Fp8Weight,
    FrozenWeight,
    Nf4Weight,
    quantised_layers,
    stacked_dense,
)

log = logging.getLogger("lora.engine")

Precision = Literal["auto", "fp32", "bf16", "fp8", "nf4"]
CACHE_DIR = Path("~/.lora/cache")
"""Where the service keeps the same files if nothing else is set."""


@dataclass
class BaseModel:
    """A frozen base. `fingerprint` is the sha256 of the source weights; `precision` is what it computes in here, and
    `why` says who chose it.

    `decoder` holds the same weights for the llama path (`forward.py`), where the family has it. In fp8 and nf4 it alone
    has them, and `hidden` cannot be called.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str
    precision: str
    device: torch.device
    decoder: Decoder | None = None
    why: str = "as asked for"

    def hidden(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Last hidden states `[batch, tokens, h]` of ids and positions int64 `[batch, tokens]`."""
        decoder = self.model.base_model
        output: Tensor = decoder(
            input_ids=ids, position_ids=positions, attend=attend, use_cache=False
        ).last_hidden_state
        return output

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[..., vocabulary]` of hidden states, with Gemma's tanh cap where the model has one."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @property
    def is_quantised(self) -> bool:
        """Whether the decoder alone has the linears' weights, in fp8 or nf4."""
        return self.precision in QUANTISED

    @property
    def parameters(self) -> int:
        """Parameters of the base, tied ones counted once."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        if self.decoder is not None and self.is_quantised:
            total += sum(group.inputs * sum(group.outputs) for group in self.decoder.groups)
        return total

    @property
    def nbytes(self) -> int:
        """Bytes of those parameters."""
        total = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        if self.decoder is not None and self.is_quantised:
            total += sum(weight.nbytes for layer in self.decoder.layers for weight in layer.weights)
        return total


def load_base(
    source: str,
    *,
    precision: Precision = "auto",
    cache_dir: Path | str = CACHE_DIR,
    device: torch.device | None = None,
) -> BaseModel:
    """Load, freeze and fingerprint a base; on CPU through the shared file in `cache_dir`, and with exact products from
    here on (`exactness.py`).

    Raises:
        BaseModelError: no such source, not a causal language model, or a family whose forward pass differs from ours.
    """
    cache_dir = Path(cache_dir).expanduser().absolute()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        ask_for_exact_products()
    folder = local_folder(source, cache_dir)
    chosen = _chosen(precision, folder, cache_dir, device)
    fingerprint = fingerprint_of(folder, cache_dir)
    dense = chosen.precision
    if dense in QUANTISED:
        dense = _chosen("auto", folder, cache_dir, device).precision
    model = open_model(dense_folder(folder, fingerprint, dense, cache_dir), DTYPES[dense])
    model.requires_grad_(False)
    model.eval()
    log.info("event=precision base=%s precision=%s why=%r", source, chosen.precision, chosen.why)
    tokenizer = load_tokenizer(folder)
    base = BaseModel(model, tokenizer, source, fingerprint, chosen.precision, model.device, why=chosen.why)
    return placed(base, device)


def placed(base: BaseModel, device: torch.device) -> BaseModel:
    """The base on `device` in its precision, with its decoder if it can have one; the given one is used up.

    Raises:
        BaseModelError: a family whose forward pass differs from ours, or that has no decoder where it needs one; or the
            device has no room for it.
    """
    try:
        return _placed(base, device)
    except torch.OutOfMemoryError as error:
        raise BaseModelError(
            f"base model {base.source}: in {base.precision} it does not fit into the memory of {device}: use a lower"
            " precision (nf4 takes the least), a smaller base, or a device with more memory"
        ) from error


def _placed(base: BaseModel, device: torch.device) -> BaseModel:
    if base.is_quantised:
        if problem := not_quantised(base.model, base.precision):
            raise BaseModelError(f"base model {base.source}: {problem}")
        _refuse_unfaithful(base)
        return _quantised(base, device)
    base.model.to(device)  # type: ignore[arg-type]
    base = replace(base, device=device)
    _refuse_unfaithful(base)
    if Decoder.misfit(base.model.config) is None:
        base.decoder = Decoder(base.model, stacked_dense if device.type == "cuda" else DenseWeight)
        _refuse_unfaithful(base)
    return base


def _quantised(base: BaseModel, device: torch.device) -> BaseModel:
    """With its linears in fp8 or nf4, group by group, so that the dense ones need not fit on the device."""
    quantise: type[Fp8Weight | Nf4Weight] = Fp8Weight if base.precision == "fp8" else Nf4Weight
    frozen: list[FrozenWeight] = []
    stacks = Decoder.stacks(base.model)
    in_few_bits = quantised_layers(len(stacks), base.precision)
    for index, groups in enumerate(stacks):
        for parts in groups:
            stacked = torch.cat([part.to(device) for part in parts])
            frozen.append(quantise(stacked) if index in in_few_bits else DenseWeight([stacked]))
            for part in parts:
                part.data = part.new_empty(0)
    base.model.to(device)  # type: ignore[arg-type]  # what is left: embedding, norms, head
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what quantising took would stay reserved: 2 GiB at 8B
    weights = iter(frozen)
    return replace(base, device=device, decoder=Decoder(base.model, lambda _: next(weights)))


def resolve_precision(
    precision: Precision, source: str, *, cache_dir: Path | str = CACHE_DIR, device: torch.device | None = None
) -> Choice:
    """What a base would compute in here. `auto` is bf16 on a GPU that has it, and on a CPU what `fastest_precision`
    measures for the base's linears.

    Raises:
        BaseModelError: no such source, or the hardware cannot do what is asked for.
    """
    cache_dir = Path(cache_dir).expanduser().absolute()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        ask_for_exact_products()  # before any, and as training will multiply
    return _chosen(precision, local_folder(source, cache_dir), cache_dir, device)


def _chosen(precision: Precision, folder: Path, cache_dir: Path, device: torch.device) -> Choice:
    if precision == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise BaseModelError("precision fp8 needs a GPU with fp8 matrix units (Hopper, Ada or later); use bf16 or nf4")
    if device.type == "cuda" and precision == "auto":
        has_bf16 = torch.cuda.is_bf16_supported()
        return Choice("bf16", "this GPU has it") if has_bf16 else Choice("fp32", "this GPU has no bf16")
    if device.type == "cuda" or precision not in ("auto", "bf16"):
        return Choice(precision, "as asked for")
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    shapes = [in_and_out(linear) for linear in adaptable_linears(_without_weights(folder)).values()]
    fastest = fastest_precision(shapes, config, cache_dir)
    if precision == "auto":
        return fastest
    if fastest.precision != "bf16":
        log.warning("event=slow_precision base=%s: use auto, which is fp32 here: %s", folder, fastest.why)
    return Choice(precision, "as asked for")


def not_quantised(model: PreTrainedModel, precision: str) -> str | None:
    """Why there is no base of this model in fp8 or nf4, if there is none."""
    misfit = Decoder.misfit(model.config)
    if misfit is None:
        return None
    return f"{precision} is there for Llama, Mistral, Qwen2 and Qwen3 alone, and {misfit}; use bf16"


def too_long(model: PreTrainedModel, tokens: int) -> str | None:
    """Why documents of so many tokens cannot go through a model, if they cannot: past its positions a learned table
    ends, and rotary ones were never trained.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or tokens <= positions:
        return None
    return (
        f"the longest row has {tokens:,} tokens and this base model {positions:,} positions: set max_seq_len to"
        f" {positions} or less"
    )


def token_rows(model: PreTrainedModel) -> int:
    """The token ids that a model can take are those below: its tokenizer may know more than the embedding and the head
    have rows.
    """
    tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return min(int(table.weight.shape[0]) for table in tables if table is not None)


def describe_base(
    source: str, cache_dir: Path, listed: Collection[str] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model without weights (on the meta device) and its tokenizer: enough to check a job's targets and rows.
    `listed` names the files of a source of which only the small ones are here.

    Raises:
        BaseModelError: no such source, or one that cannot be a base.
    """
    folder = local_folder(source, cache_dir, weights=False, listed=listed)
    return _without_weights(folder), load_tokenizer(folder)


def _without_weights(folder: Path) -> PreTrainedModel:
    with torch.device("meta"), readable(folder):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder, trust_remote_code=False)
        )
    return model


@torch.no_grad()
def _refuse_unfaithful(base: BaseModel) -> None:
    """Compare our path (packing, own attention, own head call) with the model's stock forward pass on a few tokens.

    A family that changes hidden states or logits in a way we do not know of, or that carries state from one document to
    the next, would train and serve wrongly without a sound.
    """
    config = base.model.config
    if reason := moving_positions(config):  # also of a model that came from no directory
        raise BaseModelError(f"base model {base.source}: {reason}")
    try:
        error = _packing_error(base)
    except Exception as problem:  # a forward pass that is made otherwise fails in its own way
        raise BaseModelError(
            f"base model {base.source}: its family ({config.model_type}) does not run here ({problem}); {SUPPORTED}"
        ) from problem
    if not error < (1e-4 if base.precision == "fp32" else 0.2):  # bf16: rounding alone was seen to make 0.07
        raise BaseModelError(
            f"base model {base.source}: its family ({config.model_type}) computes something that is not supported here"
            f" (logits differ by {error:.1%}); {SUPPORTED}"
        )


def _packing_error(base: BaseModel) -> float:
    """Relative difference of the logits of two documents: packed on our path, and each alone on the stock one."""
    ids = torch.arange(12, device=base.device)[None] % base.model.config.vocab_size
    lengths = [7, 5]
    positions = torch.cat([torch.arange(length, device=base.device) for length in lengths])[None]
    if base.decoder is None:
        hidden = base.hidden(ids, positions, PackedAttention(lengths))
    else:
        inputs = DecoderInput(ids[0], positions[0], [(NO_ADAPTER, len(ids[0]))])
        attention = DocumentAttention(lengths, [len(ids[0])], base.decoder.scaling, base.device)
        hidden = base.decoder.hidden(base.decoder.batch(inputs, [], attention))[None]
    ours = base.head(hidden).float()
    base.model.set_attn_implementation("eager")
    try:
        alone = [base.model(input_ids=document, use_cache=False).logits for document in ids.split(lengths, dim=1)]
    finally:
        base.model.set_attn_implementation(ATTENTION_NAME)
    stock = torch.cat(alone, dim=1).float()
    return float((ours - stock).norm() / stock.norm().clamp_min(1e-12))
