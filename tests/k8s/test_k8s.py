"""Every overlay, rendered as `kubectl apply -k` renders it, keeps the schemas and the rules; rules refuse faults.

Kubernetes' schemas come from PyPI. KubeRay's are read from the folder of its custom resource definitions that
KUBERAY_CRDS names (`helm-chart/kuberay-operator/crds` of a KubeRay release); without it only the fields that are used
here are checked.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.settings import load_settings
from tests.k8s.faults import RULES, SCHEMA_FAULTS, scheduler, serving
from tests.k8s.k8s_rules import OURS, variables
from tests.k8s.objects import OVERLAYS, ROOT, Object, Pod, named, pods, render
from tests.k8s.schemas import kuberay_schemas, our_schemas, schema_problems

KUBERAY_CRDS = os.environ.get("KUBERAY_CRDS")


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Object]]:
    return {overlay: render(overlay) for overlay in OVERLAYS}


@pytest.fixture(scope="module", params=["ours", KUBERAY_CRDS] if KUBERAY_CRDS else ["ours"])
def schemas(request: pytest.FixtureRequest) -> dict[str, Object]:
    """Our own, and KubeRay's where a folder of its custom resource definitions is named."""
    return our_schemas() if request.param == "ours" else kuberay_schemas(Path(request.param))


def refuse(complaints: list[str], part: str) -> None:
    assert any(part in complaint for complaint in complaints), f"{part!r} is not among {complaints}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_keeps_the_schemas(
    overlay: str, rendered: dict[str, list[Object]], schemas: dict[str, Object]
) -> None:
    assert schema_problems(rendered[overlay], schemas) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_keeps_every_rule(overlay: str, rendered: dict[str, list[Object]]) -> None:
    problems = {rule: problems_of(rendered[overlay]) for rule, (problems_of, _, _) in RULES.items()}
    assert {rule: found for rule, found in problems.items() if found} == {}


@pytest.mark.parametrize("fault", SCHEMA_FAULTS)
def test_schemas_refuse(fault: str, rendered: dict[str, list[Object]], schemas: dict[str, Object]) -> None:
    manifests = copy.deepcopy(rendered["gpu"])
    break_it, complaint = SCHEMA_FAULTS[fault]
    break_it(manifests)
    refuse(schema_problems(manifests, schemas), complaint)


@pytest.mark.parametrize(("rule", "fault"), [(rule, fault) for rule, parts in RULES.items() for fault in parts[2]])
def test_every_rule_refuses_its_faults(rule: str, fault: str, rendered: dict[str, list[Object]]) -> None:
    problems_of, overlay, faults = RULES[rule]
    manifests = copy.deepcopy(rendered[overlay])
    break_it, complaint = faults[fault]
    break_it(manifests)
    refuse(problems_of(manifests), complaint)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_settings_read_every_pods_environment(
    overlay: str, rendered: dict[str, list[Object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the manifests say reaches the code: no value that Settings refuses, and the right cluster and bucket."""
    for name in [name for name in os.environ if name.startswith("LORA_")]:
        monkeypatch.delenv(name)
    manifests = rendered[overlay]
    data = named(manifests, "ConfigMap")["lora-settings"]["data"]
    for pod in pods(manifests):
        container = pod.containers[0]
        if not container["image"].startswith(OURS):
            continue
        with monkeypatch.context() as patch:
            for name, value in variables(container, manifests).items():
                patch.setenv(name, value or "postgresql+psycopg://user:password@postgres/lora")
            settings = load_settings()
        assert (settings.cluster, settings.storage_url) == (data["LORA_CLUSTER"], data["LORA_STORAGE_URL"]), pod.where
        assert settings.database_url.startswith("postgresql" if "DATABASE" in str(pod) else "sqlite"), pod.where


def test_scheduler_command_runs_here(rendered: dict[str, list[Object]]) -> None:
    command = scheduler(rendered["gpu"])["containers"][0]["command"]
    done = subprocess.run(
        [sys.executable, *command[1:], "--help"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, "scheduler" in done.stdout) == (0, True), done.stderr


def test_serve_application_builds_here(rendered: dict[str, list[Object]], tmp_path: Path) -> None:
    """`serve build` in a serving pod's environment: the import path works, and every replica finds a GPU."""
    manifests = rendered["gpu"]
    spec = serving(manifests)
    workers = spec["rayClusterConfig"]["workerGroupSpecs"][0]
    pod = Pod("", {}, workers["template"]["spec"])
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    serve = Path(sys.executable).with_name("serve")
    done = subprocess.run(
        [serve, "build", application["import_path"], "--output-path", tmp_path / "built.yaml"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | variables(pod.containers[0], manifests),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (built,) = yaml.safe_load((tmp_path / "built.yaml").read_text())["applications"]
    gpus = [deployment["ray_actor_options"].get("num_gpus", 0) for deployment in built["deployments"]]
    assert 0 < sum(gpus) <= workers["minReplicas"] * pod.gpus
