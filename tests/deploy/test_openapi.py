"""The API's document: all is described, nothing on its page comes from elsewhere, and what it allows to be sent is
answered as it says, never with a server's error."""

from __future__ import annotations

import json
import re
import urllib.request
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.checks import CHECKS

from deploy.api.bodies import JobBody
from deploy.api.job_requests import _OPENAI, OWN
from tests.support.api_site import Site, running_site

MANY, FEW = 50, 8  # requests of an operation, and of one that takes nothing but names in its path
LOOKED_FOR = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "unsupported_method", "ignored_auth",
)  # fmt: skip
OPEN = {"/healthz"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("openapi")) as site:
        yield site


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def test_everything_is_described(site: Site) -> None:
    document = json.loads(read(f"{site.url}/openapi.json"))
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            said = f"{method} {path}"
            assert len(operation["description"]) > 10, said
            assert ("security" in operation) == (path not in OPEN), said
            assert operation["responses"]["default"]["content"]["application/json"]["schema"]["$ref"], said
            for media, content in operation["responses"]["200"]["content"].items():
                assert media != "application/json" or set(content["schema"]) - {"title"}, said
            assert method != "post" or "requestBody" in operation or path.endswith("}/cancel") or re.search(
                r"}/(pause|resume|rollback|rotate_secret)$", path
            ), said  # fmt: skip
    assert set(JobBody.model_fields) == {*_OPENAI, *OWN}
    page = read(f"{site.url}/docs")
    loaded = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)""", page)
    assert len(loaded) == 4 and all(re.fullmatch(r"/[a-z][^/]*(/[^/]+)?", address) for address in loaded), loaded
    assert all(read(f"{site.url}{address}") for address in loaded if not address.endswith("png"))


def known(site: Site) -> dict[str, str]:
    """The names of things that are there, by the parameter that takes them."""
    file = site.client.files.create(file=site.rows, purpose="fine-tune").id
    job = site.create("known", training_file=file)
    site.train(job.id)
    upload = site.client.uploads.create(bytes=5, filename="a.jsonl", mime_type="x", purpose="fine-tune")
    (endpoint,) = list(site.client.webhooks.list()) or [
        site.client.webhooks.create(name="x", url="http://127.0.0.1:9", event_types=["fine_tuning.job.failed"])
    ]
    return {
        "job_id": job.id, "file_id": file, "training_file": file, "upload_id": upload.id, "model": "tiny:known",
        "endpoint_id": endpoint.id,
    }  # fmt: skip


def test_what_the_document_allows_is_answered_as_it_says(site: Site) -> None:
    """Half of the requests name what is there."""
    schema: Any = schemathesis.openapi.from_url(f"{site.url}/openapi.json")
    headers = {"Authorization": f"Bearer {site.client.api_key}"}
    settings = partial(
        hypothesis.settings, derandomize=True, database=None, deadline=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    there, failures, answered = known(site), list[str](), Counter[bool]()

    def ask(case: Any, real: bool) -> None:
        if real:
            case.path_parameters = {name: there[name] for name in case.path_parameters}
            if isinstance(case.body, dict):
                case.body |= {name: there[name] for name in case.body if name in there}
        answer = case.call(headers=headers)
        answered[answer.status_code < 300] += 1
        case.validate_response(answer, checks=CHECKS.get_by_names(list(LOOKED_FOR)))

    for operation in (found.ok() for found in schema.get_all_operations()):
        try:
            requests = hypothesis.given(operation.as_strategy(), hypothesis.strategies.booleans())
            settings(max_examples=MANY if operation.body or operation.query else FEW)(requests(ask))()
        except Exception as error:
            failures.append(f"{operation.label}: {error}")
        if operation.method == "delete" or operation.path.endswith("/cancel"):
            there |= known(site)
    assert not failures, "\n\n".join(failures)
    assert answered[True] > 100 and answered[False] > 100, answered
