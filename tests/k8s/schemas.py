"""Schemas of all kinds: Kubernetes' own, KubeRay's, and of the fields that we use of what has none to be had here."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import jsonschema
import kubernetes_validate
import yaml
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from tests.k8s.objects import CLUSTER_OF, Object

_KUBERNETES = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / "v1.37.0-local-strict"
_DEFINITIONS = "/api/_definitions.json"


@cache
def _registry() -> Registry[Object]:
    contents = json.loads((_KUBERNETES / "_definitions.json").read_text())
    resource = Resource.from_contents(contents, default_specification=DRAFT202012)
    return Registry[Object]().with_resource(_DEFINITIONS, resource)


def our_schemas() -> dict[str, Object]:
    """Kind -> JSON Schema that refuses unknown fields, of the fields that the manifests use."""
    kinds = yaml.safe_load((Path(__file__).parent / "fields.yaml").read_text())["kinds"]
    return {kind: strict(schema) for kind, schema in kinds.items()}


def kuberay_schemas(folder: Path) -> dict[str, Object]:
    """The same, with all fields that there are of KubeRay's kinds, from a folder of its custom resource definitions."""
    schemas = our_schemas()
    for kind in CLUSTER_OF:
        crd = yaml.load((folder / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader)
        version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
        schemas[kind] = strict(version["schema"]["openAPIV3Schema"])
    return schemas


def strict(schema: Object) -> Object:
    """The schema with every object closed: the API server would drop an unknown field, and with it what was meant."""
    closed = dict(schema)
    if "properties" in schema:
        closed["type"] = "object"
        closed["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        closed["additionalProperties"] = False
    if "items" in schema:
        closed["items"] = strict(schema["items"])
    return closed


@cache
def _kubernetes_validator(kind: str, api_version: str) -> jsonschema.Draft202012Validator | None:
    """Of a kind of Kubernetes' own, or none."""
    group, _, version = api_version.rpartition("/")
    parts = [kind.lower(), *([group.partition(".")[0]] if group else []), version]
    file = _KUBERNETES / f"{'-'.join(parts)}.json"
    return (
        jsonschema.Draft202012Validator(json.loads(file.read_text()), registry=_registry()) if file.exists() else None
    )


def schema_problems(manifests: list[Object], schemas: dict[str, Object]) -> list[str]:
    """Where an object breaks the schema of its kind, or has a kind of which there is none."""
    problems = []
    for item in manifests:
        kind = item["kind"]
        if kind in schemas:
            validator = jsonschema.Draft202012Validator(schemas[kind], registry=_registry())
        elif (known := _kubernetes_validator(kind, item["apiVersion"])) is not None:
            validator = known
        else:
            problems.append(f"{kind}: {item['apiVersion']} has no such kind")
            continue
        for error in validator.iter_errors(item):
            problems.append(f"{kind}: {error.json_path}: {error.message[:200]}")
    return problems
