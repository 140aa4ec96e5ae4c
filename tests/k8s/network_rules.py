"""Who reaches whom by the NetworkPolicies: computed for the calls that must go through, and for those that must not."""

from __future__ import annotations

from dataclasses import dataclass

from tests.k8s.objects import Object, Pod, named, pods, selects


@dataclass(frozen=True)
class Peer:
    """A pod of somebody else: its labels, and that it is in another namespace; or, without labels, any address."""

    labels: dict[str, str]


OPERATOR = Peer({"app.kubernetes.io/name": "kuberay-operator"})
PROMETHEUS = Peer({"app.kubernetes.io/name": "prometheus"})
DNS = Peer({"k8s-app": "kube-dns"})
CONTROLLER = Peer({"app.kubernetes.io/name": "ingress-nginx"})
STRANGER = Peer({"app": "notebook"})
OUTSIDE = Peer({})


def allowed(manifests: list[Object], source: Pod | Peer, target: Pod | Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection goes through: out of the one, into the other."""
    ways = (("Egress", "egress", "to", source, target), ("Ingress", "ingress", "from", target, source))
    for kind, rules, peers, here, there in ways:
        if isinstance(here, Peer):
            continue  # under no policy of ours
        policies = [
            policy["spec"]
            for policy in named(manifests, "NetworkPolicy").values()
            if kind in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], here.labels)
        ]
        if policies and not any(
            admits(rule, peers, there, port, protocol) for spec in policies for rule in spec.get(rules, [])
        ):
            return False
    return True


def admits(rule: Object, peers: str, other: Pod | Peer, port: int, protocol: str) -> bool:
    """Whether one rule of a policy lets this through."""
    ports = rule.get("ports")
    if ports is not None and not any((one["protocol"], one["port"]) == (protocol, port) for one in ports):
        return False
    return peers not in rule or any(is_meant(peer, other) for peer in rule[peers])


def is_meant(peer: Object, other: Pod | Peer) -> bool:
    if isinstance(other, Peer) and (not other.labels or "namespaceSelector" not in peer):
        return False  # no pod, or one of another namespace
    return selects(peer["podSelector"], other.labels)


def network_problems(manifests: list[Object]) -> list[str]:
    """Calls that must go through and do not, and the other way round."""
    found = list(pods(manifests))
    training, serving, schedulers, databases, stores, vllm = (
        [pod for pod in found if pod.labels.get("app.kubernetes.io/component") == component]
        for component in ("training", "serving", "scheduler", "database", "storage", "vllm")
    )
    heads = [pod for pod in found if pod.labels.get("ray.io/node-type") == "head"]
    ours = [*training, *serving, *schedulers]
    clients = CONTROLLER if named(manifests, "Ingress") else STRANGER
    reads_tables = [pod for pod in found if "lora-database" in str(pod.spec) and pod not in databases]
    wanted = [(pod, DNS, 53, "UDP") for pod in [*ours, *vllm]]
    wanted += [(pod, OUTSIDE, 443, "TCP") for pod in [*ours, *vllm]]
    wanted += [(pod, database, 5432, "TCP") for pod in reads_tables for database in databases or [OUTSIDE]]
    wanted += [(pod, store, 8333, "TCP") for pod in ours for store in stores]
    wanted += [(one, other, 6379, "TCP") for group in (training, serving) for one in group for other in group]
    wanted += [(pod, head, 8265, "TCP") for pod in schedulers for head in heads if head in training]
    wanted += [(OPERATOR, head, 8265, "TCP") for head in heads]
    wanted += [(clients, pod, 8000, "TCP") for pod in [*serving, *vllm]]
    wanted += [
        (PROMETHEUS, pod, port, "TCP") for pod in ours for name, port in pod.ports.items() if name.endswith("metrics")
    ]
    wanted += [(head, OUTSIDE, 6379, "TCP") for head in heads if has_redis(head, manifests)]
    refused = [(STRANGER, pod, port, "TCP") for pod in [*training, *serving] for port in (6379, 8265, 10001, 8080)]
    refused += [(OUTSIDE, pod, 5432, "TCP") for pod in databases]
    refused += [(pod, head, 8265, "TCP") for pod in serving for head in heads if head in training]
    refused += [(STRANGER, pod, 8000, "TCP") for pod in serving if clients is not STRANGER]
    problems = [
        f"{name(one)} does not reach {name(other)} at {port}"
        for one, other, port, protocol in wanted
        if not allowed(manifests, one, other, port, protocol)
    ]
    return problems + [
        f"{name(one)} reaches {name(other)} at {port}"
        for one, other, port, protocol in refused
        if allowed(manifests, one, other, port, protocol)
    ]


def has_redis(head: Pod, manifests: list[Object]) -> bool:
    spec = named(manifests, head.where.partition("/")[0])[head.labels["ray.io/cluster"]]["spec"]
    return "gcsFaultToleranceOptions" in str(spec)


def name(one: Pod | Peer) -> str:
    return one.where if isinstance(one, Pod) else str(one.labels)
