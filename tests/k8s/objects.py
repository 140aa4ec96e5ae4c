"""Rendered manifests: the objects, and the pods that come of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = tuple(sorted(folder.name for folder in (K8S / "overlays").iterdir()))
CLUSTER_OF = {"RayCluster": None, "RayService": "rayClusterConfig", "RayJob": "rayClusterSpec"}
GPU = "nvidia.com/gpu"


@dataclass(frozen=True)
class Pod:
    """`where` says what it comes from; its containers include the autoscaler that KubeRay puts into a head."""

    where: str
    labels: dict[str, str]
    spec: Object

    @property
    def containers(self) -> list[Object]:
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]

    @property
    def ports(self) -> dict[str, int]:
        """Name -> number, of those that are declared."""
        declared = [port for container in self.containers for port in container.get("ports", [])]
        return {port.get("name", ""): port["containerPort"] for port in declared}

    @property
    def gpus(self) -> int:
        return sum(int(container.get("resources", {}).get("limits", {}).get(GPU, 0)) for container in self.containers)


def render(overlay: str) -> list[Object]:
    """What `kubectl apply -k` of an overlay applies."""
    kubectl = Path(sys.executable).with_name("kubectl")
    folder = K8S / "overlays" / overlay
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def named(manifests: list[Object], *kinds: str) -> dict[str, Object]:
    """Name -> object, of some kinds."""
    return {item["metadata"]["name"]: item for item in manifests if item["kind"] in kinds}


def ray_specs(manifests: list[Object]) -> Iterator[tuple[str, Object]]:
    """`Kind/name` and cluster spec of everything that becomes a Ray cluster."""
    for item in manifests:
        if item["kind"] in CLUSTER_OF:
            part = CLUSTER_OF[item["kind"]]
            yield f"{item['kind']}/{item['metadata']['name']}", item["spec"][part] if part else item["spec"]


def groups(spec: Object) -> list[Object]:
    """The head's and the workers' groups; the head's has no name."""
    return [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]


def pods(manifests: list[Object]) -> Iterator[Pod]:
    """One of each kind, with the labels that KubeRay adds."""
    for where, spec in ray_specs(manifests):
        autoscaler = {"name": "autoscaler", **spec.get("autoscalerOptions", {})}
        for group in groups(spec):
            template, name = group["template"], group.get("groupName")
            own = template.get("metadata", {}).get("labels", {})
            labels = {
                "app.kubernetes.io/name": "kuberay",
                "ray.io/cluster": where.rpartition("/")[2],
                "ray.io/node-type": "worker" if name else "head",
                "ray.io/group": name or "headgroup",
            }
            extra = [autoscaler] if spec.get("enableInTreeAutoscaling") and not name else []
            pod = {**template["spec"], "containers": [*template["spec"]["containers"], *extra]}
            yield Pod(f"{where}/{name or 'head'}", labels | own, pod)
    for item in manifests:
        if item["kind"] in ("Deployment", "StatefulSet"):
            template = item["spec"]["template"]
            where = f"{item['kind']}/{item['metadata']['name']}"
            yield Pod(where, template["metadata"].get("labels", {}), template["spec"])


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector means what has these labels; an empty one means all."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for term in selector.get("matchExpressions", []):
        is_in = labels.get(term["key"]) in term.get("values", [])
        if {"In": is_in, "NotIn": not is_in, "Exists": term["key"] in labels}[term["operator"]] is False:
            return False
    return True
