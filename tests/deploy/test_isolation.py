"""What one tenant has is nothing to another: a row for every operation of the API's document."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
import requests

from tests.support.api_site import Site, running_site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("isolation")) as site:
        yield site


@dataclass
class Row:
    """`make` makes what the operation is about, and returns its name, which path or body have."""

    make: Callable[[Site], str]
    body: Callable[[Site, str], dict[str, Any]] | None = None
    refused: tuple[int, ...] = (404,)


def file(site: Site) -> str:
    return site.client.files.create(file=site.rows, purpose="fine-tune").id


def job(site: Site) -> str:
    return site.create(f"mine-{next(NUMBERS)}").id


def paused(site: Site) -> str:
    return site.client.fine_tuning.jobs.pause(job(site)).id


def trained(site: Site) -> str:
    found = job(site)
    site.train(found)
    return found


def upload(site: Site) -> str:
    return site.client.uploads.create(bytes=13, filename="a.jsonl", mime_type="x", purpose="fine-tune").id


def whole_upload(site: Site) -> str:
    found = upload(site)
    site.client.uploads.parts.create(found, data=b'{"text": "x"}')
    return found


def parts(site: Site, name: str) -> dict[str, Any]:
    return {"part_ids": [part.id for part in site.gateway._files.table.parts(name)]}


def adapter(site: Site) -> str:
    for content in (b"1", b"2"):
        site.registry.publish("tiny", "mine", {"weights": content}, {"metrics": {}})
    return "tiny:mine"


def endpoint(site: Site) -> str:
    for one in site.client.webhooks.list():
        site.client.webhooks.delete(one.id)
    kinds: Any = ["fine_tuning.job.failed"]
    return site.client.webhooks.create(name="mine", url="http://127.0.0.1:9", event_types=kinds).id


def answering(site: Site) -> str:
    """It tells itself, which takes any body that says nothing."""
    found = endpoint(site)
    site.client.webhooks.update(found, url=f"{site.url}/healthz")
    return found


def chat(_: Site, model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}]}


NUMBERS = count()
JOB, FILE, UPLOAD, MODEL, ENDPOINT = (
    "/v1/fine_tuning/jobs/{job_id}", "/v1/files/{file_id}", "/v1/uploads/{upload_id}", "/v1/models/{model}",
    "/v1/webhook_endpoints/{endpoint_id}",
)  # fmt: skip
NAMED = {
    "POST /v1/chat/completions": Row(adapter, chat),
    "POST /v1/completions": Row(adapter, lambda _, model: {"model": model, "prompt": "Hi"}),
    f"GET {MODEL}": Row(adapter),
    f"GET {MODEL}/versions": Row(adapter),
    f"DELETE {MODEL}": Row(adapter),
    f"POST {MODEL}/promote": Row(adapter, lambda *_: {"alias": "good"}),
    f"POST {MODEL}/rollback": Row(adapter),
    "POST /v1/fine_tuning/jobs": Row(
        file, lambda _, found: {"model": "tiny", "training_file": found, "suffix": "mine"}, (400,)
    ),
    f"GET {JOB}": Row(job),
    f"POST {JOB}/cancel": Row(job),
    f"POST {JOB}/pause": Row(job),
    f"POST {JOB}/resume": Row(paused),
    f"GET {JOB}/events": Row(job),
    f"GET {JOB}/logs": Row(job),
    f"GET {JOB}/metrics": Row(job),
    f"GET {JOB}/checkpoints": Row(job),
    "GET /v1/files/result-{job_id}": Row(trained),
    "GET /v1/files/result-{job_id}/content": Row(trained),
    f"GET {FILE}": Row(file),
    f"DELETE {FILE}": Row(file),
    f"GET {FILE}/content": Row(file),
    f"POST {UPLOAD}/parts": Row(upload),
    f"POST {UPLOAD}/complete": Row(whole_upload, parts),
    f"POST {UPLOAD}/cancel": Row(upload),
    f"GET {ENDPOINT}": Row(endpoint),
    f"POST {ENDPOINT}": Row(endpoint, lambda *_: {"name": "other"}),
    f"DELETE {ENDPOINT}": Row(endpoint),
    f"POST {ENDPOINT}/rotate_secret": Row(endpoint),
    f"POST {ENDPOINT}/test": Row(answering, lambda *_: {"event_type": "fine_tuning.job.failed"}),
}
"""What names one thing: refused to the other tenant, and then answered to its own, for whom it is as it was."""
LISTED = {
    "GET /v1/models": adapter, "GET /v1/fine_tuning/jobs": job, "GET /v1/files": file,
    "GET /v1/webhook_endpoints": endpoint,
}  # fmt: skip
"""What names none: its own tenant finds the thing there, and the other does not."""
MADE = {"POST /v1/files", "POST /v1/uploads", "POST /v1/webhook_endpoints"}
"""What takes no name of anything: what is made is of whoever asks, as the rows above show."""
OF_NOBODY = {"GET /healthz", "GET /v1/webhook_event_types"}
TOTALS = {"GET /v1/capacity"}
"""Of all tenants, with the names of one's own: see test_capacity."""


def test_every_operation_has_a_row(site: Site) -> None:
    with urllib.request.urlopen(f"{site.url}/openapi.json", timeout=10) as answer:
        paths = json.load(answer)["paths"]
    operations = {f"{method.upper()} {path}" for path, found in paths.items() for method in found}
    assert operations == NAMED.keys() | LISTED.keys() | MADE | OF_NOBODY | TOTALS


@pytest.mark.parametrize("operation", NAMED)
def test_what_is_named_is_not_there_for_another(site: Site, operation: str) -> None:
    row, (method, path) = NAMED[operation], operation.split()
    name = row.make(site)
    place = path.format(job_id=name, file_id=name, upload_id=name, model=name, endpoint_id=name)
    form = (
        {"files": {"data": b"x"}} if path.endswith("/parts") else {"json": row.body(site, name) if row.body else None}
    )
    other, own = (
        requests.request(method, site.url + place, headers={"Authorization": f"Bearer {client.api_key}"}, **form)
        for client in (site.other, site.client)
    )
    assert other.status_code in row.refused and own.status_code == 200, (other.text, own.text)
    said = other.json()["error"]["message"].replace(name, "")
    assert "mine" not in said and "acme" not in said, "nor is anything else shown"


@pytest.mark.parametrize("operation", LISTED)
def test_what_is_listed_is_ones_own(site: Site, operation: str) -> None:
    name = LISTED[operation](site)
    other, own = (
        requests.get(
            site.url + operation.split()[1], headers={"Authorization": f"Bearer {client.api_key}"}
        ).json()["data"]
        for client in (site.other, site.client)
    )  # fmt: skip
    assert name in [one["id"] for one in own] and name not in [one["id"] for one in other]
