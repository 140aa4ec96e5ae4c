"""What `/v1/capacity` says of replicas, sessions and the queue, and of whom."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from ray.serve.exceptions import RayServeException

from jobs.job import SessionKey, SessionState
from jobs.store.api_keys import Scope
from tests.support.api_server import LOAD
from tests.support.api_site import Site, running_site

FACTS = {"precision": "bf16", "why": "the faster one", "forward_path": "llama", "exactness": "exact"}
UP = SessionState.LAUNCHING, SessionState.RUNNING


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("capacity")) as site:
        yield site


def capacity(site: Site, client: openai.OpenAI) -> Any:
    """As it is now, and not as of a moment ago."""
    site.gateway._capacity._last = None
    return client.get("/capacity", cast_to=object)


def session(site: Site, base: str) -> str:
    made = site.queue.create_session(SessionKey(base, "auto", 2), "c")
    assert made is not None
    assert site.queue.session_move(made.id, *UP, reason="up", fence=1)
    return made.id


def test_totals_are_of_all_and_names_are_ones_own(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, elsewhere, lost = session(site, "tiny"), session(site, "/somebodys/base"), session(site, "tiny")
    assert site.queue.resolve_session(shared, 1, {**FACTS, "places": ["GPU 1", "GPU 2"]})
    assert site.queue.renew_session(lost, 1, -1.0)
    sent: Any = {"model": "tiny", "training_file": str(site.rows)}
    mine, theirs = (
        client.fine_tuning.jobs.create(**sent, suffix=suffix).id
        for client, suffix in ((site.client, "mine"), (site.other, "theirs"))
    )
    assert site.queue.assign(mine, shared) and site.queue.assign(theirs, shared)
    assert site.queue.record_steps(shared, 1, [], tokens_per_second=200.0)
    assert site.queue.record_steps(elsewhere, 1, [], tokens_per_second=50.0), "of when it had a job"
    site.client.fine_tuning.jobs.pause(site.create("paused").id)
    site.create("waits")

    seen, others = capacity(site, site.client), capacity(site, site.key("other", Scope.INFER))
    replica = {name: value for name, value in vars(LOAD).items() if name != "slot_bytes"}
    counts = {"running": 2, "waiting": 1, "paused": 1}
    assert seen["bases"] == others["bases"] == [
        {"id": "tiny", "resident": True, "replicas": [replica | {"free_adapter_bytes": 700, "free_adapter_slots": 3}],
         "jobs": counts, "tokens_per_second": {"training": 200.0, "serving": 12.5}}
    ]  # fmt: skip
    assert seen["jobs"] == others["jobs"] == counts
    assert seen["own_jobs"] == {"running": 1, "waiting": 1, "paused": 1}
    assert others["own_jobs"] == {"running": 1, "waiting": 0, "paused": 0}
    ours, hidden = seen["sessions"]
    assert ours == {
        "id": shared, "base": "tiny", "state": "running", "precision": "bf16", "num_workers": 2,
        "places": ["GPU 1", "GPU 2"], "jobs": [{"id": mine, "model": "tiny:mine"}], "other_jobs": 1,
        "free_slots": 62, "tokens_per_second": 200.0,
    }  # fmt: skip
    assert (hidden["id"], hidden["base"], hidden["places"]) == (elsewhere, None, []), "and the lost one is not there"
    assert hidden["tokens_per_second"] == 0
    assert others["sessions"][0]["jobs"] == [{"id": theirs, "model": "tiny:theirs"}]
    for secret in ("acme", "mine", mine, "somebodys"):
        assert secret not in json.dumps(others), secret
    assert site.queue.stop_session(shared, "enough")
    assert capacity(site, site.client)["sessions"][0]["free_slots"] == 0

    def silent(_: str) -> None:
        raise RayServeException("no replica")

    monkeypatch.setattr(site.gateway._capacity._servers["tiny"], "broadcast", silent)
    (base,) = capacity(site, site.client)["bases"]
    assert (base["replicas"], base["resident"], base["tokens_per_second"]["serving"]) == (None, True, 0)
