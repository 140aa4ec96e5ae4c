"""What must hold for the Kubernetes manifests: their schemas, and what the project asks of them beyond those.

A check takes the rendered objects and answers with its complaints: a test shows it a fault and sees it refuse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from cluster.settings import Settings

Object = dict[str, Any]

ROOT = Path(__file__).parents[2]
BASE = ROOT / "k8s" / "base"
RAY_KINDS = ("RayCluster", "RayService")
GPU = "nvidia.com/gpu"
DATABASE_SECRET = "lora-database"
SEES_DATABASE = {"RayCluster/lora-training/driver", "RayService/lora-serving/head", "Deployment/lora-scheduler"}


def our_schemas() -> dict[str, Object]:
    """Kind -> JSON Schema that refuses unknown fields, of the fields that the manifests use."""
    kinds = yaml.safe_load((Path(__file__).parent / "fields.yaml").read_text())["kinds"]
    return {kind: strict(schema) for kind, schema in kinds.items()}


def kuberay_schemas(folder: Path) -> dict[str, Object]:
    """The same of all fields that there are, from a folder of KubeRay's custom resource definitions."""
    schemas = {}
    for kind in RAY_KINDS:
        crd = yaml.load((folder / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader)
        version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
        schemas[kind] = strict(version["schema"]["openAPIV3Schema"])
    # KubeRay carries Kubernetes' own pod template, which serves for a Deployment too.
    groups = schemas["RayCluster"]["properties"]["spec"]["properties"]["workerGroupSpecs"]
    schemas["Deployment"] = {
        "properties": {"spec": {"properties": {"template": groups["items"]["properties"]["template"]}}}
    }
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


def schema_problems(manifests: list[Object], schemas: dict[str, Object]) -> list[str]:
    """Where an object breaks the schema of its kind; kinds without a schema here pass."""
    problems = []
    for item in manifests:
        schema = schemas.get(item["kind"], {})
        for error in jsonschema.Draft202012Validator(schema).iter_errors(item):
            problems.append(f"{item['kind']}: {error.json_path}: {error.message[:200]}")
    return problems


def named(manifests: list[Object], kind: str) -> dict[str, Object]:
    """Name -> object, for one kind."""
    return {item["metadata"]["name"]: item for item in manifests if item["kind"] == kind}


def ray_specs(manifests: list[Object]) -> Iterator[tuple[str, Object]]:
    """`Kind/name` and cluster spec of everything that becomes a Ray cluster."""
    for item in manifests:
        if item["kind"] in RAY_KINDS:
            spec = item["spec"] if item["kind"] == "RayCluster" else item["spec"]["rayClusterConfig"]
            yield f"{item['kind']}/{item['metadata']['name']}", spec


def pods(manifests: list[Object]) -> Iterator[tuple[str, Object]]:
    """Where a pod comes from, and its spec; the autoscaler that KubeRay puts into a head is a container of it."""
    for where, spec in ray_specs(manifests):
        head = spec["headGroupSpec"]["template"]["spec"]
        autoscaler = {"name": "autoscaler", **spec.get("autoscalerOptions", {})}
        yield f"{where}/head", {**head, "containers": [*head["containers"], autoscaler]}
        for group in spec.get("workerGroupSpecs", []):
            yield f"{where}/{group['groupName']}", group["template"]["spec"]
    for name, item in named(manifests, "Deployment").items():
        yield f"Deployment/{name}", item["spec"]["template"]["spec"]


def containers(pod: Object) -> list[Object]:
    return [*pod["containers"], *pod.get("initContainers", [])]


def placement_problems(manifests: list[Object]) -> list[str]:
    """Pods of another Ray, and work where it does not belong."""
    problems = []
    for where, spec in ray_specs(manifests):
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            place = f"{where}/{group.get('groupName', 'head')}"
            alone = place == f"{where}/head" or place in SEES_DATABASE
            if alone and group["rayStartParams"].get("num-cpus") != "0":
                problems.append(
                    f"{place}: num-cpus is not '0', so that work lands beside the control plane or the database"
                )
            for container in group["template"]["spec"]["containers"]:
                if not container["image"].endswith(f"ray{spec['rayVersion']}"):
                    problems.append(f"{place}: image {container['image']} is not of Ray {spec['rayVersion']}")
    return problems


def secrets_seen(tree: Any) -> set[str]:
    """Names of the secrets that a pod sees: by variable, by envFrom, as a volume or a part of one."""
    if isinstance(tree, list):
        return set().union(*map(secrets_seen, tree))
    if not isinstance(tree, dict):
        return set()
    named_here = {
        tree[key].get("secretName") or tree[key]["name"]
        for key in ("secret", "secretRef", "secretKeyRef")
        if key in tree
    }
    return named_here.union(*map(secrets_seen, tree.values()))


def reference_problems(manifests: list[Object]) -> list[str]:
    """Objects that a pod names and nobody makes, and secrets in the wrong hands."""
    problems = [f"Secret/{name}: values are committed" for name in named(manifests, "Secret")]
    created_by_hand = set(re.findall(r"create secret generic (\S+)", (BASE.parent / "README.md").read_text()))
    tokens = {
        name for name, item in named(manifests, "RayCluster").items() if item["spec"]["authOptions"]["mode"] == "token"
    }
    for where, pod in pods(manifests):
        secrets = secrets_seen(pod)
        problems += [f"{where}: nothing makes secret {name}" for name in sorted(secrets - created_by_hand - tokens)]
        if (DATABASE_SECRET in secrets) != (where in SEES_DATABASE):
            problems.append(f"{where}: {'sees' if DATABASE_SECRET in secrets else 'lacks'} the database secret")
        if pod.get("enableServiceLinks", True):
            problems.append(f"{where}: enableServiceLinks lets a Service named lora-x set LORA_X_PORT")
        account = pod.get("serviceAccountName")
        if account and account not in named(manifests, "ServiceAccount"):
            problems.append(f"{where}: ServiceAccount {account} is not here")
        for source in [source for container in containers(pod) for source in container.get("envFrom", [])]:
            config_map = source.get("configMapRef", {}).get("name")
            if config_map and config_map not in named(manifests, "ConfigMap"):
                problems.append(f"{where}: ConfigMap {config_map} is not here")
    return problems


def variables(container: Object, manifests: list[Object]) -> dict[str, str]:
    """A container's environment without secrets; a variable taken from a secret stands with an empty value."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= named(manifests, "ConfigMap").get(source.get("configMapRef", {}).get("name"), {}).get("data", {})
    return found | {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}


def code_problems(manifests: list[Object]) -> list[str]:
    """Variables and keys that the code does not read, and names that must agree and do not."""
    known = {f"LORA_{field.upper()}" for field in Settings.model_fields}
    ((cluster, training),) = named(manifests, "RayCluster").items()
    groups = training["spec"]["workerGroupSpecs"]
    gpus = [group["maxReplicas"] * pod_gpus(group["template"]["spec"]) for group in groups]
    drivers = [group["labels"] for group in groups if f"RayCluster/{cluster}/{group['groupName']}" in SEES_DATABASE]
    agreed = {
        "LORA_CLUSTER": cluster,
        "RAY_API_SERVER_ADDRESS": f"http://{cluster}-head-svc:8265",
        "LORA_MAX_WORKERS": str(sum(gpus)),
        "LORA_DRIVER_LABELS": json.dumps(drivers[0]),
    }
    problems = []
    for where, pod in pods(manifests):
        for container in containers(pod):
            environment = variables(container, manifests)
            ports = {port.get("name"): str(port["containerPort"]) for port in container.get("ports", [])}
            expected = agreed | {"LORA_METRICS_PORT": ports.get("metrics")}
            for name, value in environment.items():
                if name.startswith("LORA_") and name not in known:
                    problems.append(f"{where}: no setting is called {name}")
                if expected.get(name, value) != value:
                    problems.append(f"{where}: {name} is {value}, not {expected[name]}")
    for name, item in named(manifests, "RayService").items():
        problems += [f"RayService/{name}: {problem}" for problem in serve_problems(item["spec"]["serveConfigV2"])]
    return problems


def pod_gpus(pod: Object) -> int:
    """How many GPUs a pod takes."""
    return sum(int(container["resources"]["limits"].get(GPU, 0)) for container in containers(pod))


def serve_problems(config_text: str) -> list[str]:
    """Keys of a serveConfigV2 that Serve would not read."""
    config = yaml.safe_load(config_text)
    ServeDeploySchema.model_validate(config)
    problems = [f"unknown key {key}" for key in sorted(set(config) - set(ServeDeploySchema.model_fields))]
    for application in config["applications"]:
        problems += [
            f"unknown key {key}" for key in sorted(set(application) - set(ServeApplicationSchema.model_fields))
        ]
    return problems
