"""k8s/base, rendered as `kubectl apply -k` renders it, keeps every rule in k8s_rules; every rule refuses its fault."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cluster.settings import load_settings
from tests.k8s.k8s_rules import (
    BASE,
    DATABASE_SECRET,
    ROOT,
    Object,
    code_problems,
    kuberay_schemas,
    named,
    our_schemas,
    placement_problems,
    pod_gpus,
    pods,
    reference_problems,
    schema_problems,
    variables,
)

Fault = Callable[[list[Object]], object]


@pytest.fixture(scope="module")
def rendered() -> list[Object]:
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run([kubectl, "kustomize", BASE], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture
def manifests(rendered: list[Object]) -> list[Object]:
    """A copy of its own for every test to break."""
    return copy.deepcopy(rendered)


KUBERAY_CRDS = os.environ.get("KUBERAY_CRDS")


@pytest.fixture(scope="module", params=["ours", KUBERAY_CRDS] if KUBERAY_CRDS else ["ours"])
def schemas(request: pytest.FixtureRequest) -> dict[str, Object]:
    """Our own, and KubeRay's where a folder of its custom resource definitions is named."""
    return our_schemas() if request.param == "ours" else kuberay_schemas(Path(request.param))


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


def set_variable(container: Object, name: str, value: str) -> None:
    container["env"] = [entry for entry in container.get("env", []) if entry["name"] != name] + [
        {"name": name, "value": value}
    ]


def refuse(complaints: list[str], part: str) -> None:
    assert any(part in complaint for complaint in complaints), f"{part!r} is not among {complaints}"


def test_base_keeps_the_schemas(manifests: list[Object], schemas: dict[str, Object]) -> None:
    assert {item["kind"] for item in manifests} >= set(schemas)
    assert schema_problems(manifests, schemas) == []


SCHEMA_FAULTS: dict[str, tuple[Fault, str]] = {
    "misspelt field": (lambda m: training(m)["spec"].update(rayVerison="2.60.0"), "rayVerison"),
    "misspelt container field": (lambda m: container(m, "gpu").update(imagePullpolicy="Always"), "imagePullpolicy"),
    "integer num-cpus": (lambda m: group(m, "driver")["rayStartParams"].update({"num-cpus": 0}), "num-cpus"),
    "autoscaler version": (lambda m: training(m)["spec"]["autoscalerOptions"].update(version="v3"), "version"),
    "bad quantity": (lambda m: container(m, "gpu")["resources"]["limits"].update(memory="64GiB"), "memory"),
    "text for a number": (lambda m: group(m, "gpu").update(maxReplicas="8"), "maxReplicas"),
    "group without name": (lambda m: group(m, "gpu").pop("groupName"), "groupName"),
    "label that is no text": (lambda m: group(m, "driver")["labels"].update({"lora-role": 1}), "lora-role"),
    "serving group without template": (
        lambda m: serving(m)["rayClusterConfig"]["workerGroupSpecs"][0].pop("template"),
        "template",
    ),
    "scheduler's variable": (lambda m: scheduler(m)["containers"][0]["env"][0].update(valuefrom={}), "valuefrom"),
}


@pytest.mark.parametrize("fault", SCHEMA_FAULTS)
def test_schemas_refuse(fault: str, manifests: list[Object], schemas: dict[str, Object]) -> None:
    break_it, complaint = SCHEMA_FAULTS[fault]
    break_it(manifests)
    refuse(schema_problems(manifests, schemas), complaint)


PLACEMENT_FAULTS: dict[str, tuple[Fault, str]] = {
    "another Ray": (lambda m: training(m)["spec"].update(rayVersion="2.59.0"), "is not of Ray 2.59.0"),
    "image of another Ray": (lambda m: container(m, "gpu").update(image="ray-lora:0.1.0-ray2.59.0"),
     "is not of Ray 2.60.0"),
    "work on the head": (lambda m: training(m)["spec"]["headGroupSpec"]["rayStartParams"].clear(),
     "num-cpus is not '0'"),
    "ranks beside the database": (lambda m: group(m, "driver")["rayStartParams"].update({"num-cpus": "2"}),
     "driver: num-cpus is not '0'"),
}  # fmt: skip


SECRET_VOLUME = {"name": "db", "projected": {"sources": [{"secret": {"name": DATABASE_SECRET}}]}}
REFERENCE_FAULTS: dict[str, tuple[Fault, str]] = {
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
}


CODE_FAULTS: dict[str, tuple[Fault, str]] = {
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


RULES = {
    "one Ray, and work where it belongs": (placement_problems, PLACEMENT_FAULTS),
    "names of what exists, and secrets kept": (reference_problems, REFERENCE_FAULTS),
    "what the code reads": (code_problems, CODE_FAULTS),
}


@pytest.mark.parametrize("rule", RULES)
def test_base_keeps_every_rule(rule: str, manifests: list[Object]) -> None:
    assert RULES[rule][0](manifests) == []


@pytest.mark.parametrize(("rule", "fault"), [(rule, fault) for rule, (_, faults) in RULES.items() for fault in faults])
def test_every_rule_refuses_its_faults(rule: str, fault: str, manifests: list[Object]) -> None:
    problems_of, faults = RULES[rule]
    break_it, complaint = faults[fault]
    break_it(manifests)
    refuse(problems_of(manifests), complaint)


def test_settings_read_every_pods_environment(manifests: list[Object], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the manifests say reaches the code: no value that Settings refuses, and the right cluster and bucket."""
    for name in [name for name in os.environ if name.startswith("LORA_")]:
        monkeypatch.delenv(name)
    data = named(manifests, "ConfigMap")["lora-settings"]["data"]
    for where, pod in pods(manifests):
        with monkeypatch.context() as patch:
            for name, value in variables(pod["containers"][0], manifests).items():
                patch.setenv(name, value or "postgresql+psycopg://user:password@postgres/lora")
            settings = load_settings()
        assert (settings.cluster, settings.storage_url) == (data["LORA_CLUSTER"], data["LORA_STORAGE_URL"]), where
        assert settings.database_url.startswith("postgresql" if "DATABASE" in str(pod) else "sqlite"), where


def test_scheduler_command_runs_here(manifests: list[Object]) -> None:
    command = scheduler(manifests)["containers"][0]["command"]
    done = subprocess.run(
        [sys.executable, *command[1:], "--help"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, "scheduler" in done.stdout) == (0, True), done.stderr


def test_serve_application_builds_here(manifests: list[Object], tmp_path: Path) -> None:
    """`serve build` in a serving pod's environment: the import path works, and every replica finds a GPU."""
    spec = serving(manifests)
    workers = spec["rayClusterConfig"]["workerGroupSpecs"][0]
    pod = workers["template"]["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    done = subprocess.run(
        [
            Path(sys.executable).with_name("serve"),
            "build",
            application["import_path"],
            "--output-path",
            tmp_path / "built.yaml",
        ],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | variables(pod["containers"][0], manifests),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (built,) = yaml.safe_load((tmp_path / "built.yaml").read_text())["applications"]
    gpus = [deployment["ray_actor_options"].get("num_gpus", 0) for deployment in built["deployments"]]
    assert 0 < sum(gpus) <= workers["minReplicas"] * pod_gpus(pod)
