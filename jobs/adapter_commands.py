"""`python -m jobs adapters ...`: what is published, which version a name means, and adapters from and to elsewhere."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.adapter_lifecycle import promote, roll_back
from cluster.aliases import LATEST, Gate
from cluster.registry import AdapterRegistry, AdapterVersion
from cluster.settings import ALIAS, Settings
from cluster.storage.directory import open_storage
from jobs.published_adapters import delete_model, export_gguf, export_merged, export_tar, import_adapter
from jobs.screen import print_json
from jobs.spec import ADAPTER_NAME, SpecError
from jobs.store.jobs import JobQueue
from lora_core.data.json_values import finite


def add_adapter_commands(commands: Any) -> None:
    """Add `adapters` and what can be done with them to a parser's commands."""
    adapters = commands.add_parser("adapters", help="published adapters, their versions and aliases")
    verbs = adapters.add_subparsers(required=True, metavar="WHAT")

    def verb(name: str, command: Any, text: str, model: str | None = None) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = verbs.add_parser(name, help=text)
        parser.set_defaults(command=command)
        if model is not None:
            parser.add_argument("model", help=model)
        return parser

    of_version = "<base>:<adapter>@<number, version or alias>; without @ its latest"
    listed = verb("list", _list, "every adapter, its latest version and its aliases")
    text = "an adapter's versions, where they come from, and their figures"
    for listing in (listed, verb("versions", _versions, text, "<base>:<adapter>")):
        listing.add_argument("--json", action="store_true", help="print JSON")
    moved = verb("promote", _promote, "let an alias mean a version", of_version)
    moved.add_argument("alias", help="such as prod")
    for bound, words in (("min", "at least"), ("max", "at most")):
        text = f"the version's metric has to be {words} this, now and at later promotions"
        moved.add_argument(f"--{bound}", action="append", default=[], metavar="METRIC=NUMBER", type=_bound, help=text)
    moved.add_argument("--no-gate", action="store_true", help="whatever its metrics are, now and later")
    verb("rollback", _rollback, "let an alias mean again what it meant before", "<base>:<adapter>@<alias>")
    text = "delete an adapter, with @ one of its versions or aliases; not while something needs it"
    verb("delete", _delete, text, "<base>:<adapter>, <base>:<adapter>@<number, version or alias>")
    out = verb("export", _export, "write a version as a tar file, for llama.cpp, or merged into its base", of_version)
    out.add_argument("path", type=Path, help="the file, or with --merged the directory, to write")
    form = out.add_mutually_exclusive_group()
    form.add_argument("--merged", choices=("fp32", "bf16"), help="a model directory in this precision")
    form.add_argument("--gguf", action="store_true", help="a LoRA adapter for llama.cpp, beside the base in GGUF")
    came = verb("import", _import, "publish a PEFT adapter from elsewhere", "<base>:<adapter>")
    came.add_argument("source", help="its directory or s3:// prefix")


def _bound(text: str) -> tuple[str, float]:
    metric, _, number = text.partition("=")
    return metric, float(number)


def _registry(settings: Settings) -> AdapterRegistry:
    return AdapterRegistry(open_storage(settings.storage_url), settings.tenant)


def _parts(model: str) -> tuple[str, str, str | None]:
    """Part `<base>:<adapter>@<version>`. Raises SpecError."""
    base, _, rest = model.partition(":")
    name, at, version = rest.partition("@")
    if not base or not name or (at and not version):
        raise SpecError(["write <base>:<adapter>, or <base>:<adapter>@<number, version or alias>"], model)
    return base, name, version if at else None


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _list(settings: Settings, arguments: argparse.Namespace) -> int:
    entries = _registry(settings).list_adapters()
    if arguments.json:
        print_json([{"model": f"{entry.base}:{entry.name}", **asdict(entry)} for entry in entries])
        return 0
    for entry in entries:
        meanings = {LATEST: entry.number or entry.version}
        meanings |= {alias: meaning.number or meaning.version for alias, meaning in sorted(entry.aliases.items())}
        shown = ", ".join(f"{alias} {meaning}" for alias, meaning in meanings.items())
        print(f"{entry.base}:{entry.name}  {shown}  since {_when(entry.created_at)}")
    return 0


def _versions(settings: Settings, arguments: argparse.Namespace) -> int:
    registry, (base, name, _) = _registry(settings), _parts(arguments.model)
    named: dict[str, list[str]] = {}
    for alias, found in sorted(registry.aliases(base, name).items()):
        named.setdefault(found.meaning.version, []).append(alias)
    versions = registry.list_versions(base, name)
    if arguments.json:
        print_json([_version_document(version, named.get(version.version, [])) for version in versions])
        return 0
    for version in versions:
        manifest = version.manifest
        figures = [f"{metric} {value:.4f}" for metric, value in manifest.get("metrics", {}).items() if "loss" in metric]
        of = [*named.get(version.version, []), manifest.get("job", f"imported from {manifest.get('imported_from')}")]
        print(
            f"@{version.number or '-':<4} {version.version}  {_when(manifest['created_at'])}  {', '.join(of + figures)}"
        )
    return 0


def _version_document(version: AdapterVersion, aliases: list[str]) -> dict[str, Any]:
    """Return a version as JSON can hold it, with its aliases, where it comes from and its figures."""
    known = {name: version.manifest.get(name) for name in ("job", "imported_from", "metrics", "created_at")}
    own = {"model": str(version), "version": version.version, "number": version.number, "digest": version.digest}
    document: dict[str, Any] = finite(own | {"aliases": aliases} | known)
    return document


def _promote(settings: Settings, arguments: argparse.Namespace) -> int:
    registry, (base, name, version) = _registry(settings), _parts(arguments.model)
    gates = [Gate(metric, min=number) for metric, number in arguments.min]
    gates += [Gate(metric, max=number) for metric, number in arguments.max]
    chosen = gates if gates or arguments.no_gate else None
    moved = promote(registry, registry.resolve(base, name, version or LATEST), arguments.alias, chosen)
    print(f"{base}:{name}@{arguments.alias} is version {moved.meaning.number or moved.meaning.version} now")
    return 0


def _rollback(settings: Settings, arguments: argparse.Namespace) -> int:
    base, name, alias = _parts(arguments.model)
    moved = roll_back(_registry(settings), base, name, alias or LATEST)
    print(f"{base}:{name}@{alias or LATEST} is version {moved.meaning.number or moved.meaning.version} again")
    return 0


def _delete(settings: Settings, arguments: argparse.Namespace) -> int:
    print(f"deleted {delete_model(_registry(settings), JobQueue(settings.database_url), *_parts(arguments.model))}")
    return 0


def _export(settings: Settings, arguments: argparse.Namespace) -> int:
    registry, (base, name, version) = _registry(settings), _parts(arguments.model)
    found = registry.resolve(base, name, version or LATEST)
    if arguments.merged:
        export_merged(registry, settings, found, arguments.path, arguments.merged)
    elif arguments.gguf:
        export_gguf(registry, settings, found, arguments.path)
    else:
        export_tar(registry, found, arguments.path)
    print(f"wrote {found} to {arguments.path}")
    return 0


def _import(settings: Settings, arguments: argparse.Namespace) -> int:
    base, name, version = _parts(arguments.model)
    if version is not None or ALIAS.fullmatch(base) is None or ADAPTER_NAME.fullmatch(name) is None:
        problem = "it cannot be published under this name: write <base>:<adapter> as in a job, and no version"
        raise SpecError([problem], arguments.model)
    published = import_adapter(_registry(settings), settings, arguments.source, base, name)
    print(f"published {published}")
    return 0
