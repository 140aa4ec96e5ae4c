"""What KubeRay's operator and Kubernetes refuse, or let pass and then never run, beyond what their schemas say."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.k8s.objects import Object, Pod, groups, named, pods, ray_specs, selects

_LONGEST = {"RayCluster": 53, "RayService": 47, "RayJob": 47}  # pods and Services are named after them
_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


def operator_problems(manifests: list[Object]) -> list[str]:
    """What the operator's own checks refuse."""
    problems = []
    for item in manifests:
        name = item["metadata"]["name"]
        if len(name) > _LONGEST.get(item["kind"], 63) or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
            problems.append(f"{item['kind']}/{name}: the name is too long, or no DNS label")
    names = [(item["kind"], item["metadata"]["name"]) for item in manifests]
    problems += [f"{kind}/{name}: is there twice" for kind, name in sorted(set(names)) if names.count((kind, name)) > 1]
    for where, spec in ray_specs(manifests):
        problems += [f"{where}: {problem}" for problem in cluster_problems(spec)]
    for name, job in named(manifests, "RayJob").items():
        problems += [f"RayJob/{name}: {problem}" for problem in job_problems(job)]
    return problems


def cluster_problems(spec: Object) -> Iterator[str]:
    """Of one cluster's spec."""
    if spec.get("enableInTreeAutoscaling") and spec.get("autoscalerOptions", {}).get("version") != "v2":
        yield "the autoscaler is not of version v2"
    if not spec.get("rayVersion"):
        yield "rayVersion is missing"
    names = [group["groupName"] for group in spec.get("workerGroupSpecs", [])]
    if len(set(names)) < len(names):
        yield "two groups have one name"
    for group in groups(spec):
        name, pod = group.get("groupName", "head"), group["template"]["spec"]
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 1)
        if not least <= group.get("replicas", least) <= most:
            yield f"{name}: replicas are not between minReplicas and maxReplicas"
        if "idleTimeoutSeconds" in group and not spec.get("enableInTreeAutoscaling"):
            yield f"{name}: idleTimeoutSeconds is read by the autoscaler, which is off"
        if pod.get("restartPolicy", "Never") != "Never" and spec.get("enableInTreeAutoscaling"):
            yield f"{name}: restartPolicy is not Never, with which autoscaler v2 counts a pod twice"
        if {"labels", "resources"} & set(group["rayStartParams"]):
            yield f"{name}: labels and resources of a group stand beside rayStartParams"
        if "num-gpus" in group["rayStartParams"] and Pod("", {}, pod).gpus:
            yield f"{name}: num-gpus and the pod's own GPUs are both set"
        if spec.get("gcsFaultToleranceOptions"):
            variables = [entry["name"] for container in pod["containers"] for entry in container.get("env", [])]
            if {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD"} & set(variables) or "redis-password" in group["rayStartParams"]:
                yield f"{name}: Redis is named in gcsFaultToleranceOptions and in the pod"


def job_problems(job: Object) -> Iterator[str]:
    """Of a RayJob, and of one that Kueue starts."""
    spec = job["spec"]
    ends = spec.get("shutdownAfterJobFinishes", False)
    if "ttlSecondsAfterFinished" in spec and not ends:
        yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes"
    if spec.get("suspend") and not ends:
        yield "suspend without shutdownAfterJobFinishes"
    if _QUEUE_LABEL in job["metadata"].get("labels", {}):
        if not ends:
            yield "keeps its quota for ever: shutdownAfterJobFinishes is not set"
        if spec["rayClusterSpec"].get("enableInTreeAutoscaling"):
            yield "Kueue counts its pods once, so that it must not grow"


def kueue_problems(manifests: list[Object]) -> list[str]:
    """Queues that are not there, and resources that a queue does not cover or has too little of."""
    problems = []
    locals_, queues = named(manifests, "LocalQueue"), named(manifests, "ClusterQueue")
    for name, item in named(manifests, "RayJob").items():
        queue = locals_.get(item["metadata"].get("labels", {}).get(_QUEUE_LABEL, ""))
        cluster_queue = queues.get(queue["spec"]["clusterQueue"]) if queue else None
        if cluster_queue is None:
            problems.append(f"RayJob/{name}: no queue leads to a ClusterQueue")
            continue
        for group in cluster_queue["spec"]["resourceGroups"]:
            quotas = {part["name"] for flavor in group["flavors"] for part in flavor["resources"]}
            if quotas != set(group["coveredResources"]):
                problems.append("ClusterQueue: what it covers and what it has quota of differ")
            flavors = {flavor["name"] for flavor in group["flavors"]} - set(named(manifests, "ResourceFlavor"))
            problems += [f"ClusterQueue: no ResourceFlavor {flavor}" for flavor in sorted(flavors)]
        covered = {name for group in cluster_queue["spec"]["resourceGroups"] for name in group["coveredResources"]}
        asked = {
            name
            for pod in pods(manifests)
            if pod.where.startswith("RayJob/")
            for container in pod.containers
            for name in container.get("resources", {}).get("requests", {})
        }
        problems += [
            f"RayJob/{name}: asks for {what}, which its queue does not cover" for what in sorted(asked - covered)
        ]
    return problems


def wiring_problems(manifests: list[Object]) -> list[str]:
    """Selectors that select nothing, ports that are not there, and volumes that are not mounted from anywhere."""
    problems, found = [], list(pods(manifests))
    made = {f"{name}-serve-svc" for name in named(manifests, "RayService")}  # by KubeRay
    for item in manifests:
        kind, name, spec = item["kind"], item["metadata"]["name"], item.get("spec", {})
        if kind in ("Deployment", "StatefulSet"):
            if not selects(spec["selector"], spec["template"]["metadata"].get("labels", {})):
                problems.append(f"{kind}/{name}: does not select its own pods")
        elif kind in ("Service", "PodMonitor", "PodDisruptionBudget"):
            selector = {"matchLabels": spec["selector"]} if kind == "Service" else spec["selector"]
            chosen = [pod for pod in found if selects(selector, pod.labels)]
            problems += [] if chosen else [f"{kind}/{name}: selects no pod"]
            wanted = [port["targetPort"] for port in spec.get("ports", [])]
            wanted += [endpoint["port"] for endpoint in spec.get("podMetricsEndpoints", [])]
            there = {port for pod in chosen for port in pod.ports}
            problems += [f"{kind}/{name}: no pod has a port {port}" for port in wanted if port not in there]
        elif kind == "Ingress":
            problems += [] if spec.get("tls") else [f"Ingress/{name}: has no TLS"]
            backends = [path["backend"]["service"]["name"] for rule in spec["rules"] for path in rule["http"]["paths"]]
            services = made | set(named(manifests, "Service"))
            problems += [f"Ingress/{name}: no Service {backend}" for backend in backends if backend not in services]
    for name, budget in named(manifests, "PodDisruptionBudget").items():
        if named(manifests, "Deployment")[name]["spec"]["replicas"] <= budget["spec"]["minAvailable"]:
            problems.append(f"PodDisruptionBudget/{name}: no node could ever be drained")
    return problems + [problem for pod in found for problem in pod_problems(pod, manifests)]


def pod_problems(pod: Pod, manifests: list[Object]) -> Iterator[str]:
    """Probes of ports that are not there, and mounts without a volume."""
    claims = named(manifests, "StatefulSet").get(pod.where.rpartition("/")[2], {}).get("spec", {})
    volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
    volumes |= {claim["metadata"]["name"] for claim in claims.get("volumeClaimTemplates", [])}
    for container in pod.containers:
        own = {port["name"] for port in container.get("ports", [])}
        for kind in ("readinessProbe", "livenessProbe"):
            probe = container.get(kind, {})
            port = (probe.get("httpGet") or probe.get("tcpSocket") or {}).get("port")
            if port is not None and port not in own:
                yield f"{pod.where}: {kind} asks port {port}, which it has not"
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"{pod.where}: mounts {mount['name']}, which is no volume"
