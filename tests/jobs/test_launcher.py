"""A Ray that does not answer, in every way in which it does not, is one error with one sentence."""

from __future__ import annotations

import pytest
from ray.exceptions import RpcError
from ray.util.state.exception import ServerUnavailable

from jobs.scheduling import launcher
from jobs.scheduling.launcher import Launcher, RayUnreachableError, SubmissionState
from tests.support.machine import free_port


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where nobody listens, as the environment's."""
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    return address


def test_an_address_where_nobody_listens_is_said_at_once(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "JobSubmissionClient", lambda: pytest.fail("Ray would take 40 s"))
    with pytest.raises(RayUnreachableError) as caught:
        Launcher({}).size()
    sentence = str(caught.value)
    assert sentence.startswith(f"Ray's API does not answer: nothing listens at {nobody} (")
    assert sentence.count("does not answer") == 1
    assert Launcher({}).state("session-1-a1").state is SubmissionState.UNKNOWN


def test_a_web_address_where_nobody_listens(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"http://{nobody}")
    with pytest.raises(RayUnreachableError) as caught:
        Launcher({}).size()
    assert str(caught.value).count("does not answer") == 1


@pytest.mark.parametrize("error", [RpcError("timed out"), ServerUnavailable(), ConnectionError("cut"), RuntimeError()])
def test_whatever_ray_raises_for_want_of_an_answer_is_that(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def get_address(self) -> str:
            return "http://127.0.0.1:1"

        def no_answer(self, *_: object) -> None:
            raise error

        get_job_info = list_jobs = no_answer

    monkeypatch.setattr(launcher, "list_nodes", lambda *_, **__: Client().no_answer())
    one = Launcher({})
    one._connected = Client()  # type: ignore[assignment]
    with pytest.raises(RayUnreachableError):
        one.size()
    with pytest.raises(RayUnreachableError):
        one.others_running()
    assert one.state("session-1-a1").state is SubmissionState.UNKNOWN
