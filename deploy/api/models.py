"""`/v1/models`: bases and adapters with where they come from, and what can be done with adapters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Literal, cast

from fastapi import APIRouter, Depends, Request
from typing_extensions import TypedDict

from cluster.adapter_lifecycle import AdapterConflict, promote, roll_back
from cluster.aliases import LATEST, Alias, Gate, alias_problem
from cluster.registry import AdapterEntry, AdapterNotFound, AdapterRegistry, AdapterVersion
from cluster.storage.base import StorageCorrupt
from deploy.api.bodies import Promotion, body_of
from deploy.api.errors import ApiError
from deploy.api.keys import Caller, caller_of, needs
from deploy.api.responses import Lineage, Model, ModelName, model_object, parse_model
from deploy.api.schemas import Problem, read_document, refused
from deploy.api.tenant_names import TenantNames
from jobs.published_adapters import delete_model
from jobs.store.api_keys import Scope
from jobs.store.jobs import JobQueue
from lora_core.data.json_values import finite

_NAMES_SHOWN = 30
_LINEAGES = 20_000  # that are remembered


class ModelList(TypedDict):
    object: Literal["list"]
    data: Sequence[Model]


class DeletedModel(TypedDict):
    id: str
    object: Literal["model"]
    deleted: bool


class AliasObject(TypedDict):
    """What an alias means now: `version` is a number, or an id where there is none."""

    id: str
    object: Literal["model.alias"]
    version: int | str
    digest: str


class Models:
    """The routes of models, and what the names of models mean to a caller. `bases` are those that are served."""

    def __init__(self, bases: Sequence[str], names: TenantNames, registry: AdapterRegistry, queue: JobQueue) -> None:
        self._bases, self._names, self._registry, self._queue = bases, names, registry, queue
        self._lineages: dict[tuple[str, str, str, str], Lineage] = {}
        self._started = time.time()

    def router(self) -> APIRouter:
        """Return the routes; who may train may change adapters, too."""
        router, model = APIRouter(tags=["Models"]), "/v1/models/{model:path}"
        reading, changing = [Depends(needs(Scope.INFER, Scope.TRAIN))], [Depends(needs(Scope.TRAIN))]
        router.add_api_route("/v1/models", self.list, dependencies=reading)
        router.add_api_route(f"{model}/versions", self.versions, dependencies=reading)
        router.add_api_route(model, self.retrieve, dependencies=reading)
        router.add_api_route(model, self.delete, methods=["DELETE"], dependencies=changing)
        body = body_of(Promotion)
        router.add_api_route(
            f"{model}/promote", self.promote, methods=["POST"], dependencies=changing, openapi_extra=body
        )
        router.add_api_route(f"{model}/rollback", self.roll_back, methods=["POST"], dependencies=changing)
        return router

    def parse(self, model: str) -> ModelName | None:
        """Part a model's name; None where it is of no base that is served."""
        return parse_model(model, self._bases)

    async def digest(self, caller: Caller, model: str, name: ModelName) -> tuple[str, str | None]:
        """Return whose adapter it is, and what a request is answered with: None where it is of the base itself. Raises
        ApiError (404).
        """
        if name.adapter is None:
            return caller.tenant, None
        try:
            return await self._names.digest(caller.tenant, name.base, name.adapter, name.version)
        except AdapterNotFound as error:
            raise await self.unknown(caller, model, str(error)) from error

    async def unknown(self, caller: Caller, model: str, reason: str = "") -> ApiError:
        """Return a 404 with the models that exist; the reason says which versions do."""
        names = [*self._bases, *(f"{entry.base}:{entry.name}" for _, entry in await self._entries(caller))]
        more = f" and {len(names) - _NAMES_SHOWN} more, see /v1/models" if len(names) > _NAMES_SHOWN else ""
        message = f"the model {model!r} does not exist{f' ({reason})' if '@' in model and reason else ''}"
        message += f"; there are: {', '.join(names[:_NAMES_SHOWN])}{more}"
        return ApiError(404, message, "model_not_found", "model")

    async def list(self, request: Request) -> ModelList:
        """List bases and adapters: the tenant's own, and those that are published to all."""
        bases = [model_object(name, name, self._started) for name in self._bases]
        adapters = await asyncio.gather(*(self._listed(*one) for one in await self._entries(caller_of(request))))
        return {"object": "list", "data": [*bases, *(one for one in adapters if one is not None)]}

    async def retrieve(self, request: Request, model: str) -> Model:
        """Describe `<base>`, `<base>:<adapter>` or `<base>:<adapter>@<version or alias>`."""
        caller, name = caller_of(request), self.parse(model)
        if name is None:
            raise await self.unknown(caller, model)
        if name.adapter is None:
            return model_object(model, name.base, self._started)
        owner, _ = await self.digest(caller, model, name)
        registry = self._registry.of(owner)
        version = await self._ask(caller, model, registry.resolve, name.base, name.adapter, name.version)
        number = await asyncio.to_thread(registry.number, version)
        aliases = await asyncio.to_thread(registry.aliases, name.base, name.adapter)
        of_this = [alias for alias, found in sorted(aliases.items()) if found.meaning.version == version.version]
        described = model_object(model, name.base, version.manifest["created_at"], version.digest)
        return {**described, "version": number, "aliases": of_this, **_lineage(version)}

    async def versions(self, request: Request, model: str) -> ModelList:
        """List the versions of an adapter, the newest first, each with the aliases that mean it."""
        caller, base, adapter, _ = await self._adapter(request, model)
        owner, _ = await self.digest(caller, model, ModelName(base, adapter, LATEST))
        registry = self._registry.of(owner)
        aliases = await asyncio.to_thread(registry.aliases, base, adapter)
        found = await self._ask(caller, model, registry.list_versions, base, adapter)
        listed: Sequence[Model] = [
            {
                **model_object(str(one), base, one.manifest["created_at"], one.digest),
                "version": one.number,
                "aliases": [alias for alias, of in sorted(aliases.items()) if of.meaning.version == one.version],
                **_lineage(one),
            }
            for one in reversed(found)
        ]
        return {"object": "list", "data": listed}

    async def delete(self, request: Request, model: str) -> DeletedModel:
        """Delete an adapter with all versions, a version, or an alias; refused while something needs it."""
        caller, base, adapter, version = await self._adapter(request, model)
        registry = self._registry.of(caller.tenant)
        await self._ask(caller, model, delete_model, registry, self._queue, base, adapter, version)
        return {"id": model, "object": "model", "deleted": True}

    async def promote(self, request: Request, model: str) -> AliasObject:
        """Let an alias mean this version, if it passes the gates that come with the request, or those of before."""
        caller, base, adapter, version = await self._adapter(request, model)
        alias, gates = _promotion(await request.body())
        registry = self._registry.of(caller.tenant)
        found = await self._ask(caller, model, registry.resolve, base, adapter, version or LATEST)
        moved = await self._ask(caller, model, promote, registry, found, alias, gates)
        return _alias_object(f"{base}:{adapter}@{alias}", moved)

    async def roll_back(self, request: Request, model: str) -> AliasObject:
        """Let an alias mean again what it meant before."""
        caller, base, adapter, alias = await self._adapter(request, model)
        registry = self._registry.of(caller.tenant)
        moved = await self._ask(caller, model, roll_back, registry, base, adapter, alias or LATEST)
        return _alias_object(f"{base}:{adapter}@{alias or LATEST}", moved)

    async def _entries(self, caller: Caller) -> Sequence[tuple[str, AdapterEntry]]:
        """Return the adapters that a caller sees, of bases that are served, and whose they are."""
        return [one for one in await self._names.entries(caller.tenant) if one[1].base in self._bases]

    async def _listed(self, owner: str, entry: AdapterEntry) -> Model | None:
        """Return an adapter; None where its latest version was deleted meanwhile, or is damaged."""
        key = (owner, entry.base, entry.name, entry.version)
        if key not in self._lineages:
            try:
                version = await asyncio.to_thread(self._registry.of(owner).resolve, *key[1:])
            except (AdapterNotFound, StorageCorrupt):
                return None
            self._lineages[key] = _lineage(version)
            if len(self._lineages) > _LINEAGES:
                del self._lineages[next(iter(self._lineages))]
        described = model_object(f"{entry.base}:{entry.name}", entry.base, entry.created_at, entry.digest)
        meanings = {alias: meaning.number or meaning.version for alias, meaning in sorted(entry.aliases.items())}
        return {**described, "version": entry.number, "aliases": meanings, **self._lineages[key]}

    async def _adapter(self, request: Request, model: str) -> tuple[Caller, str, str, str | None]:
        """Return who wants to change which adapter, and what stands behind its @. Raises ApiError."""
        caller, name = caller_of(request), self.parse(model)
        if name is None:
            raise await self.unknown(caller, model)
        if name.adapter is None:
            message = (
                f"{model} is a base model, which its operator names in LORA_BASE_MODELS; only adapters change here"
            )
            raise ApiError(403, message, "base_model", "model")
        return caller, name.base, name.adapter, name.version if "@" in model else None

    async def _ask(self, caller: Caller, model: str, ask: Any, *arguments: Any) -> Any:
        """Read or change the registry beside the event loop. Raises ApiError."""
        try:
            return await asyncio.to_thread(ask, *arguments)
        except AdapterNotFound as error:
            raise await self.unknown(caller, model, str(error)) from error
        except AdapterConflict as error:
            raise ApiError(409, str(error), "model_in_use", "model") from error


def _lineage(version: AdapterVersion) -> Lineage:
    manifest = version.manifest
    return cast(Lineage, {name: finite(manifest[name]) for name in Lineage.__annotations__ if name in manifest})


def _alias_object(model: str, alias: Alias) -> AliasObject:
    meaning = alias.meaning
    return {
        "id": model,
        "object": "model.alias",
        "version": meaning.number or meaning.version,
        "digest": meaning.digest,
    }


def _promotion(body: bytes) -> tuple[str, list[Gate] | None]:
    """Return the alias and gates of a request. Raises ApiError with everything that is wrong."""
    document = read_document(body)
    problems: list[Problem] = []
    if not isinstance(alias := document.get("alias"), str):
        problems.append(("alias", "missing_parameter", "alias must be a name such as prod"))
    elif (problem := alias_problem(alias)) is not None:
        problems.append(("alias", "invalid_value", f"alias: {problem}"))
    gates, given = list[Gate](), document.get("gates")
    for index, gate in enumerate(given if isinstance(given, list) else []):
        fields = gate if isinstance(gate, dict) else {}
        bounds = {bound: value for bound in ("min", "max") if (value := fields.get(bound)) is not None}
        numbers = [one for one in bounds.values() if isinstance(one, int | float) and not isinstance(one, bool)]
        named = isinstance(fields.get("metric"), str) and not set(fields) - {"metric", "min", "max"}
        if not named or not bounds or len(numbers) < len(bounds):
            sentence = f"gates.{index} must have a metric, and a number as min or max or both"
            problems.append((f"gates.{index}", "invalid_value", sentence))
        else:
            gates.append(Gate(gate["metric"], **bounds))
    if given is not None and not isinstance(given, list):
        problems.append(("gates", "invalid_value", "gates must be a list"))
    if unknown := sorted(set(document) - {"alias", "gates"}):
        problems.append((unknown[0], "unknown_parameter", f"there is no {', '.join(unknown)} here; leave it out"))
    if problems:
        raise refused(problems)
    return str(alias), None if given is None else gates
