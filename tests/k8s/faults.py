"""Faults of manifests, as people make them: which overlay, what breaks it, and a part of what must be said of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.k8s.k8s_rules import (
    DATABASE_SECRET,
    code_problems,
    placement_problems,
    reference_problems,
    security_problems,
)
from tests.k8s.kuberay_rules import kueue_problems, operator_problems, wiring_problems
from tests.k8s.network_rules import network_problems
from tests.k8s.objects import Object, named

Break = Callable[[list[Object]], object]
Faults = dict[str, tuple[Break, str]]


def training(manifests: list[Object]) -> Object:
    return named(manifests, "RayCluster")["lora-training"]


def group(manifests: list[Object], name: str) -> Object:
    return next(group for group in training(manifests)["spec"]["workerGroupSpecs"] if group["groupName"] == name)


def container(manifests: list[Object], name: str) -> Object:
    return group(manifests, name)["template"]["spec"]["containers"][0]


def scheduler(manifests: list[Object]) -> Object:
    return named(manifests, "Deployment")["lora-scheduler"]["spec"]["template"]["spec"]


def serving(manifests: list[Object]) -> Object:
    return named(manifests, "RayService")["lora-serving"]["spec"]


def job(manifests: list[Object]) -> Object:
    return named(manifests, "RayJob")["lora-training"]


def of(manifests: list[Object], kind: str, name: str) -> Any:
    return named(manifests, kind)[name]["spec"]


def policy(manifests: list[Object], name: str) -> Any:
    return of(manifests, "NetworkPolicy", name)


def set_variable(container: Object, name: str, value: str) -> None:
    container["env"] = [entry for entry in container.get("env", []) if entry["name"] != name] + [
        {"name": name, "value": value}
    ]


def rename(item: Object, name: str) -> None:
    item["metadata"]["name"] = name


SCHEMA_FAULTS: Faults = {
    "misspelt field": (lambda m: training(m)["spec"].update(rayVerison="2.60.0"), "rayVerison"),
    "misspelt container field": (lambda m: container(m, "gpu").update(imagePullpolicy="Always"), "imagePullpolicy"),
    "integer num-cpus": (lambda m: group(m, "driver")["rayStartParams"].update({"num-cpus": 0}), "num-cpus"),
    "autoscaler version": (lambda m: training(m)["spec"]["autoscalerOptions"].update(version="v3"), "version"),
    "text for a number": (lambda m: group(m, "gpu").update(maxReplicas="8"), "maxReplicas"),
    "group without name": (lambda m: group(m, "gpu").pop("groupName"), "groupName"),
    "label that is no text": (lambda m: group(m, "driver")["labels"].update({"lora-role": 1}), "lora-role"),
    "serving group without template": (
        lambda m: serving(m)["rayClusterConfig"]["workerGroupSpecs"][0].pop("template"),
        "template",
    ),
    "scheduler's variable": (lambda m: scheduler(m)["containers"][0]["env"][0].update(valuefrom={}), "valuefrom"),
    "unknown kind": (
        lambda m: m.append({"apiVersion": "v1", "kind": "Deploymnet", "metadata": {"name": "x"}}),
        "no such kind",
    ),
    "another version of a kind": (
        lambda m: named(m, "PodDisruptionBudget")["lora-scheduler"].update(apiVersion="policy/v1beta1"),
        "no such kind",
    ),
    "text for a port": (lambda m: policy(m, "scheduler")["egress"][0]["ports"][0].update(port=True), "port"),
    "misspelt alert": (lambda m: of(m, "PrometheusRule", "lora")["groups"].append({"name": "x", "rule": []}), "rule"),
}

PLACEMENT_FAULTS: Faults = {
    "another Ray": (lambda m: training(m)["spec"].update(rayVersion="2.59.0"), "is not of Ray 2.59.0"),
    "image of another Ray": (
        lambda m: container(m, "gpu").update(image="ray-lora:0.1.0-ray2.59.0"),
        "is not of Ray 2.60.0",
    ),
    "work on the head": (
        lambda m: training(m)["spec"]["headGroupSpec"]["rayStartParams"].clear(),
        "num-cpus is not '0'",
    ),
    "ranks beside the database": (
        lambda m: group(m, "driver")["rayStartParams"].update({"num-cpus": "2"}),
        "driver: num-cpus is not '0'",
    ),
    "GPUs without toleration": (lambda m: group(m, "gpu")["template"]["spec"].pop("tolerations"), "does not tolerate"),
    "killed before a checkpoint": (
        lambda m: group(m, "gpu")["template"]["spec"].pop("terminationGracePeriodSeconds"),
        "before a checkpoint",
    ),
}

SECURITY_FAULTS: Faults = {
    "root": (lambda m: scheduler(m)["securityContext"].pop("runAsNonRoot"), "may run as root"),
    "rights": (lambda m: container(m, "gpu").pop("securityContext"), "may gain rights"),
    "rights of the autoscaler": (
        lambda m: training(m)["spec"]["autoscalerOptions"].pop("securityContext"),
        "autoscaler: may gain rights",
    ),
    "image that may change": (lambda m: scheduler(m)["containers"][0].update(image="ray-lora:latest"), "may change"),
    "limits without requests": (lambda m: container(m, "gpu")["resources"].pop("requests"), "requests no memory"),
    "GPU in requests alone": (
        lambda m: container(m, "gpu")["resources"]["limits"].pop("nvidia.com/gpu"),
        "limited differently",
    ),
    "bad quantity": (lambda m: container(m, "gpu")["resources"]["limits"].update(memory="64GiB"), "no quantity"),
    "unlimited memory": (lambda m: scheduler(m)["containers"][0]["resources"].pop("limits"), "limits no memory"),
}

SECRET_VOLUME = {"name": "db", "projected": {"sources": [{"secret": {"name": DATABASE_SECRET}}]}}
REFERENCE_FAULTS: Faults = {
    "database in the ranks": (
        lambda m: container(m, "gpu").update(env=container(m, "driver")["env"]),
        "lora-training/gpu: sees the database",
    ),
    "database by envFrom": (
        lambda m: container(m, "gpu")["envFrom"].append({"secretRef": {"name": DATABASE_SECRET}}),
        "lora-training/gpu: sees the database",
    ),
    "database as a volume": (
        lambda m: group(m, "gpu")["template"]["spec"]["volumes"].append(SECRET_VOLUME),
        "lora-training/gpu: sees the database",
    ),
    "database in an init container": (
        lambda m: group(m, "gpu")["template"]["spec"].update(initContainers=[container(m, "driver")]),
        "lora-training/gpu: sees the database",
    ),
    "database in the autoscaler": (
        lambda m: training(m)["spec"]["autoscalerOptions"].update(envFrom=[{"secretRef": {"name": DATABASE_SECRET}}]),
        "lora-training/head: sees the database",
    ),
    "database in serving": (
        lambda m: serving(m)["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(
            env=container(m, "driver")["env"]
        ),
        "lora-serving/gpu: sees the database",
    ),
    "driver without database": (
        lambda m: container(m, "driver").update(env=[]),
        "lora-training/driver: lacks the database",
    ),
    "committed secret": (
        lambda m: m.append({"kind": "Secret", "metadata": {"name": "x"}, "data": {}}),
        "Secret/x: values are committed",
    ),
    "secret that nobody makes": (
        lambda m: container(m, "gpu")["envFrom"][1]["secretRef"].update(name="lora-bucket"),
        "nothing makes secret lora-bucket",
    ),
    "variables from Services": (lambda m: scheduler(m).pop("enableServiceLinks"), "lora-scheduler: enableServiceLinks"),
    "account that nobody makes": (lambda m: scheduler(m).update(serviceAccountName="admin"), "ServiceAccount admin"),
    "settings that nobody makes": (
        lambda m: container(m, "gpu")["envFrom"][0]["configMapRef"].update(name="lora"),
        "ConfigMap lora is not here",
    ),
    "another namespace": (
        lambda m: named(m, "Deployment")["lora-scheduler"]["metadata"].update(namespace="default"),
        "in another namespace",
    ),
}

CODE_FAULTS: Faults = {
    "unknown variable": (
        lambda m: set_variable(container(m, "gpu"), "LORA_STORAGE", "x"),
        "no setting is called LORA_STORAGE",
    ),
    "unknown variable of an init container": (
        lambda m: scheduler(m).update(initContainers=[{"name": "x", "env": [{"name": "LORA_X", "value": ""}]}]),
        "no setting is called LORA_X",
    ),
    "unknown setting in the ConfigMap": (
        lambda m: named(m, "ConfigMap")["lora-settings"]["data"].update(LORA_BUCKET="x"),
        "no setting is called LORA_BUCKET",
    ),
    "another cluster's queue": (
        lambda m: named(m, "ConfigMap")["lora-settings"]["data"].update(LORA_CLUSTER="other"),
        "LORA_CLUSTER is other",
    ),
    "another cluster's head": (
        lambda m: set_variable(scheduler(m)["containers"][0], "RAY_API_SERVER_ADDRESS", "http://ray-head-svc:8265"),
        "RAY_API_SERVER_ADDRESS is http://ray-head-svc:8265",
    ),
    "metrics on another port": (
        lambda m: set_variable(scheduler(m)["containers"][0], "LORA_METRICS_PORT", "9101"),
        "LORA_METRICS_PORT is 9101",
    ),
    "drivers without their label": (
        lambda m: group(m, "driver").update(labels={"role": "driver"}),
        "LORA_DRIVER_LABELS is",
    ),
    "more GPUs than the scheduler knows": (
        lambda m: group(m, "gpu").update(maxReplicas=9),
        "LORA_MAX_WORKERS is 8, not 9",
    ),
    "misspelt Serve key": (
        lambda m: serving(m).update(serveConfigV2="http_option: {}\n" + serving(m)["serveConfigV2"]),
        "unknown key http_option",
    ),
    "misspelt application key": (
        lambda m: serving(m).update(serveConfigV2=serving(m)["serveConfigV2"].replace("route_prefix", "routeprefix")),
        "unknown key routeprefix",
    ),
}

OPERATOR_FAULTS: Faults = {
    "name that is too long": (lambda m: rename(named(m, "RayService")["lora-serving"], "s" * 48), "too long"),
    "name that is no label": (lambda m: rename(training(m), "lora_training"), "no DNS label"),
    "twice": (lambda m: m.append(training(m)), "is there twice"),
    "autoscaler v1": (lambda m: training(m)["spec"]["autoscalerOptions"].pop("version"), "not of version v2"),
    "no version": (lambda m: training(m)["spec"].pop("rayVersion"), "rayVersion is missing"),
    "more at least than at most": (lambda m: group(m, "gpu").update(minReplicas=9), "not between"),
    "two groups of a name": (lambda m: group(m, "gpu").update(groupName="driver"), "two groups have one name"),
    "restarts beside the autoscaler": (
        lambda m: group(m, "gpu")["template"]["spec"].update(restartPolicy="Always"),
        "restartPolicy",
    ),
    "labels in rayStartParams": (lambda m: group(m, "gpu")["rayStartParams"].update(labels="{}"), "stand beside"),
    "GPUs said twice": (lambda m: group(m, "gpu")["rayStartParams"].update({"num-gpus": "1"}), "both set"),
    "idle time without autoscaler": (
        lambda m: training(m)["spec"].update(enableInTreeAutoscaling=False),
        "which is off",
    ),
    "Redis named twice": (
        lambda m: set_variable(container(m, "gpu"), "RAY_REDIS_ADDRESS", "redis:6379"),
        "Redis is named",
    ),
}

WIRING_FAULTS: Faults = {
    "monitor of a port without name": (
        lambda m: of(m, "PodMonitor", "lora-ray")["podMetricsEndpoints"][1].update(port="autoscaler"),
        "no pod has a port autoscaler",
    ),
    "monitor that selects nothing": (
        lambda m: of(m, "PodMonitor", "lora-scheduler")["selector"]["matchLabels"].update({"app": "lora"}),
        "selects no pod",
    ),
    "Deployment of other pods": (
        lambda m: of(m, "Deployment", "lora-scheduler")["selector"]["matchLabels"].update({"app": "lora"}),
        "does not select its own pods",
    ),
    "budget that keeps every pod": (
        lambda m: of(m, "PodDisruptionBudget", "lora-scheduler").update(minAvailable=2),
        "could ever be drained",
    ),
    "probe of another port": (
        lambda m: scheduler(m)["containers"][0]["livenessProbe"]["tcpSocket"].update(port="http"),
        "which it has not",
    ),
    "mount without volume": (lambda m: group(m, "gpu")["template"]["spec"].pop("volumes"), "which is no volume"),
    "ingress to nothing": (
        lambda m: of(m, "Ingress", "lora")["rules"][0]["http"]["paths"][0]["backend"]["service"].update(name="lora"),
        "no Service lora",
    ),
    "ingress without TLS": (lambda m: of(m, "Ingress", "lora").pop("tls"), "has no TLS"),
}

NETWORK_FAULTS: Faults = {
    "no DNS": (lambda m: policy(m, "outside")["egress"].pop(0), "kube-dns'} at 53"),
    "no bucket": (lambda m: policy(m, "outside")["egress"].pop(1), "does not reach {} at 443"),
    "no operator": (lambda m: policy(m, "serving")["ingress"].pop(2), "kuberay-operator'} does not reach"),
    "no Prometheus": (lambda m: m.remove(named(m, "NetworkPolicy")["metrics"]), "prometheus'} does not reach"),
    "Ray open to all": (lambda m: policy(m, "training").update(ingress=[{}]), "notebook'} reaches RayCluster"),
    "no policy at all": (
        lambda m: [m.remove(item) for item in list(named(m, "NetworkPolicy").values())],
        "reaches RayCluster/lora-training/head at 8265",
    ),
    "past the ingress": (lambda m: policy(m, "serving")["ingress"][1].pop("from"), "reaches RayService"),
    "scheduler without its head": (lambda m: policy(m, "scheduler").update(egress=[]), "scheduler does not reach"),
}

KUEUE_FAULTS: Faults = {
    "resource without quota": (
        lambda m: of(m, "ClusterQueue", "lora")["resourceGroups"][0]["coveredResources"].remove("memory"),
        "asks for memory",
    ),
    "queue that is not there": (lambda m: rename(named(m, "LocalQueue")["lora"], "other"), "no queue leads"),
    "flavour that is not there": (
        lambda m: rename(named(m, "ResourceFlavor")["lora-gpu"], "h200"),
        "no ResourceFlavor",
    ),
}

JOB_FAULTS: Faults = {
    "quota for ever": (lambda m: job(m)["spec"].pop("shutdownAfterJobFinishes"), "keeps its quota for ever"),
    "suspended for ever": (
        lambda m: job(m)["spec"].update(shutdownAfterJobFinishes=False, suspend=True),
        "suspend without",
    ),
    "growing under Kueue": (
        lambda m: job(m)["spec"]["rayClusterSpec"].update(enableInTreeAutoscaling=True),
        "must not grow",
    ),
}

RULES: dict[str, tuple[Callable[[list[Object]], list[str]], str, Faults]] = {
    "one Ray, and work where it belongs": (placement_problems, "gpu", PLACEMENT_FAULTS),
    "pods without rights, and with a size": (security_problems, "gpu", SECURITY_FAULTS),
    "names of what exists, and secrets kept": (reference_problems, "gpu", REFERENCE_FAULTS),
    "what the code reads": (code_problems, "gpu", CODE_FAULTS),
    "what the operator takes": (operator_problems, "production", OPERATOR_FAULTS),
    "jobs that the operator takes": (operator_problems, "kueue", JOB_FAULTS),
    "ports and selectors that meet": (wiring_problems, "production", WIRING_FAULTS),
    "who reaches whom": (network_problems, "production", NETWORK_FAULTS),
    "what a queue admits": (kueue_problems, "kueue", KUEUE_FAULTS),
}
