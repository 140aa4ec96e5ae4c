"""The Serve application as settings make it, and which replica an adapter is asked of; without a cluster."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.request_router.common import ReplicaQueueLengthCache
from ray.serve.request_router import PendingRequest

from cluster.settings import Settings
from deploy import app as application
from deploy.serving.adapter_router import AdapterRouter

ROOT = Path(__file__).parents[2]


def test_the_application_is_imported_without_torch() -> None:
    code = "import sys, deploy.app; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_replicas_ask_for_a_share_of_a_gpu_only_where_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(application, "_has_gpus", lambda: False)
    assert application._resources(Settings(home=tmp_path)) == {}
    assert application._resources(Settings(home=tmp_path, gpus_per_replica=1)) == {"num_gpus": 1}
    monkeypatch.setattr(application, "_has_gpus", lambda: True)
    assert application._resources(Settings(home=tmp_path)) == {"num_gpus": 0.4}


def test_the_gateway_alone_is_told_where_the_database_is(tmp_path: Path) -> None:
    labels = {"lora-role": "gateway"}
    settings = Settings(home=tmp_path, base_models={"tiny": "/nowhere"}, gateway_labels=labels)
    gateway = application.build_app(settings)._bound_deployment
    assert gateway.ray_actor_options is not None and gateway.ray_actor_options["label_selector"] == labels
    told, servers, admission = gateway.init_args
    assert told.database_url == settings.database_url
    others = [servers["tiny"]._bound_deployment.init_args[1], admission._bound_deployment.init_args[0]]
    assert [other.database_url for other in others] == ["", ""]


def test_replicas_are_as_many_as_settings_say(tmp_path: Path) -> None:
    assert application._replicas(Settings(home=tmp_path)) == {"num_replicas": 1}
    settings = Settings(home=tmp_path, min_replicas=0, max_replicas=3, target_ongoing_requests=5)
    scaled = application._replicas(settings)["autoscaling_config"]
    assert (scaled.min_replicas, scaled.max_replicas, scaled.target_ongoing_requests) == (0, 3, 5)
    with pytest.raises(ValueError, match="must be at least LORA_MIN_REPLICAS"):
        Settings(home=tmp_path, min_replicas=2, max_replicas=1)


def test_an_adapter_has_a_home_until_that_has_its_share() -> None:
    """Other adapters have others, in every process the same; when a replica comes or goes, the others' stay."""
    router: Any = object.__new__(AdapterRouter)
    router.initialize_state(share=4.0)
    router._replica_queue_len_cache = ReplicaQueueLengthCache()
    replicas: list[Any] = [SimpleNamespace(replica_id=ReplicaID(f"r{n}", DeploymentID("tiny"))) for n in range(5)]

    def order(digest: str | None, among: list[Any]) -> list[list[Any]]:
        async def choose() -> list[list[Any]]:
            asked = SimpleNamespace(digest=digest)
            return await router.choose_replicas(among, PendingRequest([asked], {}, cast(Any, None)))

        return asyncio.run(choose())

    digests = [f"{n:064x}" for n in range(200)]
    homes = {digest: order(digest, replicas)[0][0] for digest in digests}
    assert [sum(home is replica for home in homes.values()) > 20 for replica in replicas] == [True] * 5
    assert {digest: order(digest, replicas[::-1])[0][0] for digest in digests} == homes
    fewer = {digest: order(digest, replicas[1:])[0][0] for digest in digests}
    assert all(fewer[digest] is home for digest, home in homes.items() if home is not replicas[0])
    home, second = order(digests[0], replicas)[:2]
    router._replica_queue_len_cache.update(home[0].replica_id, 3)
    assert order(digests[0], replicas)[0] == home
    router._replica_queue_len_cache.update(home[0].replica_id, 4)
    assert order(digests[0], replicas)[0] == second and order(digests[0], replicas)[-1] == home
    (two,) = order(None, replicas)
    assert len(two) == 2


@pytest.mark.parametrize(("visible", "there"), [(None, True), ("0", True), ("", False), ("-1", False)])
def test_gpus_that_are_hidden_from_ray_are_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, there: bool
) -> None:
    monkeypatch.setattr(application.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(application.Path, "glob", lambda path, pattern: iter([path / "nvidia0"]))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert application._has_gpus() is there
