"""What the project asks of its manifests. A check takes rendered objects and answers with its complaints."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from cluster.settings import Settings
from tests.k8s.objects import CLUSTER_OF, GPU, K8S, Object, Pod, groups, named, pods, ray_specs

DATABASE_SECRET = "lora-database"
SEES_DATABASE = {
    "RayCluster/lora-training/driver",
    "RayService/lora-serving/head",
    "RayJob/lora-training/head",  # the scheduler runs there
    "RayJob/lora-training/driver",
    "Deployment/lora-scheduler",
    "StatefulSet/postgres",
}
OURS = ("ray-lora:", "ray-lora-vllm:")


def placement_problems(manifests: list[Object]) -> list[str]:
    """Pods of another Ray, work where it does not belong, and GPUs that nobody can have."""
    problems = []
    for where, spec in ray_specs(manifests):
        for group in groups(spec):
            place = f"{where}/{group.get('groupName', 'head')}"
            alone = place == f"{where}/head" or place in SEES_DATABASE
            if alone and group["rayStartParams"].get("num-cpus") != "0":
                problems.append(
                    f"{place}: num-cpus is not '0', so that work lands beside the control plane or the database"
                )
            for container in group["template"]["spec"]["containers"]:
                if not container["image"].endswith(f"ray{spec['rayVersion']}"):
                    problems.append(f"{place}: image {container['image']} is not of Ray {spec['rayVersion']}")
    checkpoint = float(named(manifests, "ConfigMap")["lora-settings"]["data"]["LORA_CHECKPOINT_SECONDS"])
    for pod in pods(manifests):
        tolerated = [toleration.get("key") for toleration in pod.spec.get("tolerations", [])]
        if pod.gpus and GPU not in tolerated:
            problems.append(f"{pod.where}: GPU nodes are tainted, and it does not tolerate that")
        working = pod.labels.get("ray.io/node-type") == "worker"
        if working and pod.spec.get("terminationGracePeriodSeconds", 30) < checkpoint:
            problems.append(f"{pod.where}: is killed before a checkpoint is written")
    return problems


def security_problems(manifests: list[Object]) -> list[str]:
    """What Kubernetes' restricted profile asks of pods, images that may change, and sizes that are not said."""
    problems = []
    for pod in pods(manifests):
        if pod.spec.get("securityContext", {}).get("runAsNonRoot") is not True:
            problems.append(f"{pod.where}: may run as root")
        for container in pod.containers:
            context = container.get("securityContext", {})
            if context.get("allowPrivilegeEscalation") is not False or "ALL" not in str(context.get("capabilities")):
                problems.append(f"{pod.where}/{container['name']}: may gain rights")
            if container["name"] == "autoscaler":
                continue
            if not re.search(r":.*\d+\.\d+", container["image"]):
                problems.append(f"{pod.where}: image {container['image']} may change")
            problems += [f"{pod.where}: {problem}" for problem in size_problems(container.get("resources", {}))]
    return problems


def size_problems(resources: Object) -> list[str]:
    """Of a container's requests and limits."""
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    problems = [f"requests no {name}" for name in ("cpu", "memory") if name not in requests]
    problems += ["limits no memory"] if "memory" not in limits else []
    if requests.get("memory") != limits.get("memory") or requests.get(GPU) != limits.get(GPU):
        problems.append("memory or GPUs are requested and limited differently")
    for name, value in (*requests.items(), *limits.items()):
        if not re.fullmatch(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?", str(value)):
            problems.append(f"{name} {value} is no quantity")
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
    readme = (K8S / "README.md").read_text()
    by_hand = set(re.findall(r"create secret generic (\S+)", readme))
    tokens = set(named(manifests, *CLUSTER_OF))  # of `mode: token`, which the schemas ask for
    for item in manifests:
        if item["kind"] not in ("Namespace", "ResourceFlavor", "ClusterQueue"):
            name = f"{item['kind']}/{item['metadata']['name']}"
            problems += [] if item["metadata"].get("namespace") == "ray-lora" else [f"{name}: is in another namespace"]
    for pod in pods(manifests):
        secrets = secrets_seen(pod.spec)
        problems += [f"{pod.where}: nothing makes secret {name}" for name in sorted(secrets - by_hand - tokens)]
        if (DATABASE_SECRET in secrets) != (pod.where in SEES_DATABASE):
            problems.append(f"{pod.where}: {'sees' if DATABASE_SECRET in secrets else 'lacks'} the database secret")
        if pod.spec.get("enableServiceLinks", True):
            problems.append(f"{pod.where}: enableServiceLinks lets a Service named lora-x set LORA_X_PORT")
        account = pod.spec.get("serviceAccountName")
        if account and account not in named(manifests, "ServiceAccount"):
            problems.append(f"{pod.where}: ServiceAccount {account} is not here")
        for source in [source for container in pod.containers for source in container.get("envFrom", [])]:
            config_map = source.get("configMapRef", {}).get("name")
            if config_map and config_map not in named(manifests, "ConfigMap"):
                problems.append(f"{pod.where}: ConfigMap {config_map} is not here")
    return problems


def variables(container: Object, manifests: list[Object]) -> dict[str, str]:
    """A container's environment without secrets; a variable taken from a secret stands with an empty value."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= named(manifests, "ConfigMap").get(source.get("configMapRef", {}).get("name"), {}).get("data", {})
    return found | {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}


def workers(spec: Object) -> int:
    """Ranks that a training cluster can have: one a GPU, or one a CPU pod of those that take work."""
    found = [(group, Pod("", {}, group["template"]["spec"])) for group in spec["workerGroupSpecs"]]
    gpus = sum(group["maxReplicas"] * pod.gpus for group, pod in found)
    return gpus or sum(group["maxReplicas"] * int(group["rayStartParams"].get("num-cpus", 0)) for group, _ in found)


def code_problems(manifests: list[Object]) -> list[str]:
    """Variables and keys that the code does not read, and names that must agree and do not."""
    known = {f"LORA_{field.upper()}" for field in Settings.model_fields}
    ((where, training),) = (pair for pair in ray_specs(manifests) if not pair[0].startswith("RayService/"))
    cluster = where.rpartition("/")[2]
    drivers = [group["labels"] for group in training["workerGroupSpecs"] if group["groupName"] == "driver"]
    agreed = {
        "LORA_CLUSTER": cluster,
        "RAY_API_SERVER_ADDRESS": f"http://{cluster}-head-svc:8265",
        "LORA_MAX_WORKERS": str(workers(training)),
        "LORA_DRIVER_LABELS": json.dumps(drivers[0]),
    }
    problems = []
    for pod in pods(manifests):
        for container in pod.containers:
            if not container.get("image", OURS[0]).startswith(OURS):
                continue
            for name, value in variables(container, manifests).items():
                if name.startswith("LORA_") and name not in known:
                    problems.append(f"{pod.where}: no setting is called {name}")
                if agreed.get(name, value) != value:
                    problems.append(f"{pod.where}: {name} is {value}, not {agreed[name]}")
                if name == "LORA_METRICS_PORT" and int(value) not in pod.ports.values():
                    problems.append(f"{pod.where}: LORA_METRICS_PORT is {value}, which is no port of it")
    for name, item in named(manifests, "RayService").items():
        problems += [f"RayService/{name}: {problem}" for problem in serve_problems(item["spec"]["serveConfigV2"])]
    return problems


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
