"""The files of a base model: found, named by their content, and put into the form that processes share.

A source is a Hugging Face hub id, a local directory or a GGUF file. What is not one precision in safetensors, or not
the precision that is computed in, is converted once, into the cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lora_core.models.attention import ATTENTION_NAME
from lora_core.models.checks import WEIGHTS, BaseModelError, refuse_unusable, weight_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


BASE_ALONE: dict[str, Any] = {"adapter_kwargs": {"subfolder": "no adapter"}}
"""For transformers' from_pretrained, which with peft installed puts an adapter that lies beside the weights into the
model: it is looked for below this name instead."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory."""
    with readable(folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over vocabulary and chat template: what must be equal for a prompt to mean the same tokens."""
    template = (
        tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else json.dumps(tokenizer.chat_template)
    )
    content = json.dumps([sorted(tokenizer.get_vocab().items()), template])
    return hashlib.sha256(content.encode()).hexdigest()


def local_folder(source: str, cache_dir: Path, *, weights: bool = True, listed: Collection[str] | None = None) -> Path:
    """The directory that holds the source: itself, a hub snapshot, or a GGUF file's conversion. Without `weights` a
    hub's holds the small files alone; so does a directory of which `listed` names all files.

    Raises:
        BaseModelError: there is none, or it can be no base.
    """
    path = Path(source)
    with contextlib.suppress(RuntimeError):  # of a user who is not known here: then there is no such directory
        path = path.expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _converted_gguf(path.resolve(), cache_dir)
    if path.is_dir():
        folder = path.resolve()
        refuse_unusable(folder, source, listed)
        return folder
    if source.startswith(("/", ".", "~")) or path.suffix == ".gguf":
        raise BaseModelError(f"base model {source}: there is no such file or directory")
    folder = _hub_snapshot(source, weights)
    refuse_unusable(folder, source, None if weights else _hub_names(source, folder))
    return folder


def _hub_snapshot(source: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    small = ["*.json", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(source, allow_patterns=[*small, "*.safetensors"] if weights else small))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BaseModelError(
            f"base model {source}: it is no alias of LORA_BASE_MODELS, no local path, and the hub did not give it"
            f" ({type(error).__name__}); check the name, the network or HF_TOKEN"
        ) from error


def _hub_names(source: str, folder: Path) -> set[str]:
    """A repository's files, of those that are fetched; what the hub does not say is taken to be there."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        names = set(HfApi().list_repo_files(source))
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return {path.name for path in folder.iterdir()} | {WEIGHTS[0]}
    return {name for name in names if not name.endswith(".bin")}


def fingerprint_of(folder: Path, cache_dir: Path) -> str:
    """sha256 over the weight files of a model directory; remembered by path, size and time of each file."""
    origin = folder / "source.json"  # a conversion stands for the file it came from; a copy of one may be changed
    if origin.is_file() and folder.resolve().parent == (cache_dir / "bases").resolve():
        return str(json.loads(origin.read_text())["sha256"])
    digests = [[file.name, _file_sha256(file.resolve(), cache_dir)] for file in weight_files(folder)]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _file_sha256(file: Path, cache_dir: Path) -> str:
    stat = file.stat()
    key = hashlib.sha256(f"{file}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()
    memo = cache_dir / "sha256" / key
    if memo.is_file():
        return memo.read_text()
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    memo.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=memo.parent, delete=False) as temporary:
        temporary.write(digest)
    Path(temporary.name).replace(memo)
    return digest


def _converted_gguf(file: Path, cache_dir: Path) -> Path:
    digest = _file_sha256(file, cache_dir)

    def convert(scratch: Path) -> None:
        # The whole path: transformers would take a file of that name in the working directory instead.
        arguments: dict[str, Any] = {"gguf_file": str(file), "local_files_only": True}
        with readable(file), _gguf_read_once():
            model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **BASE_ALONE, **arguments)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **arguments)
        tokenizer.save_pretrained(scratch)
        write_dense(model, scratch)
        (scratch / "source.json").write_text(json.dumps({"sha256": digest, "file": file.name}))

    return _build_once(cache_dir / "bases" / f"{digest[:16]}-gguf", convert)


_loading = threading.Lock()
"""While it loads a model transformers replaces `tie_weights` of all models, and two threads at once can leave it so:
models made of a config later would have a head of their own where it should be the embedding. So are gguf's below.
"""


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Within it gguf remembers: transformers reads a file's whole header for the config, the weights and the tokenizer,
    and asks for the names of all tensors once a module, which is most of the time that a small model takes.
    """
    with _loading:
        forgetful = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        for name, function in forgetful.items():
            setattr(gguf, name, functools.cache(function))
        try:
            yield
        finally:
            for name, function in forgetful.items():
                setattr(gguf, name, function)


def dense_folder(folder: Path, fingerprint: str, precision: str, cache_dir: Path) -> Path:
    """`folder` itself where its weights are one precision, the one computed in; else a copy of it that is."""
    files = weight_files(folder)
    if all(file.suffix == ".safetensors" for file in files) and _dtypes(files) == {precision}:
        return folder
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()

    def convert(scratch: Path) -> None:
        write_dense(open_model(folder, DTYPES[precision]), scratch)
        (scratch / "source.json").write_text(json.dumps({"sha256": fingerprint, "folder": str(folder)}))

    return _build_once(cache_dir / "bases" / f"{fingerprint[:16]}-{config[:8]}-{precision}", convert)


def _dtypes(files: list[Path]) -> set[str]:
    names = {"F32": "fp32", "BF16": "bf16"}
    found = set()
    for file in files:
        with readable(file), safe_open(file, framework="pt") as tensors:
            found |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118 - not a dict
    return {names.get(dtype, dtype) for dtype in found}


def write_dense(model: PreTrainedModel, folder: Path, replaced: Mapping[str, Tensor] | None = None) -> None:
    """Weights (some `replaced` by others, by name) and config; `save_pretrained` would refuse a model that came from
    GGUF.
    """
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    state = model.state_dict() | dict(replaced or {})
    state = {name: tensor.contiguous() for name, tensor in state.items() if name not in tied}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)  # it would say "gguf" of a dense file
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """The target, which `build` fills where it does not exist."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        scratch = target.parent / f".{target.name}.partial"
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed while it held the lock
        scratch.mkdir()
        try:
            build(scratch)
            return scratch.replace(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def open_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with every one of its weights from the folder: transformers would draw at random those that are
    missing.
    """
    with readable(folder), _loading:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, by name
            **BASE_ALONE,
        )
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if missing:
        raise BaseModelError(
            f"base model {folder}: {len(missing)} weights are missing or have another shape ({missing[0]} ...);"
            " save the model again"
        )
    return model


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """What transformers raises about files that it cannot use comes in many types (a bad GGUF: struct.error)."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BaseModelError(f"base model {path}: it cannot be opened as a causal language model ({reason})") from error
