"""The gateway over HTTP without Ray: the routes, keys and errors of the real one, and a base that says "hello"."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import uvicorn

from cluster.settings import Settings
from deploy.api.admission_server import AdmissionServer
from deploy.api.gateway import Gateway
from deploy.serving.protocol import Completion, Delta, GenerateRequest, ReplicaLoad, StreamStart
from tests.support.machine import free_port

PROMPT_TOKENS, ANSWER_TOKENS = 3, 5
LOAD = ReplicaLoad(
    place="GPU 1", precision="bf16", base_bytes=4000, running=3, waiting=0, slots=32, adapters=2, adapter_bytes=300,
    adapter_capacity=1000, slot_bytes=200, tokens_per_second=12.5,
)  # fmt: skip


class Hello:
    """What stands for the handle of an adapter server; `asked` is what it was asked last. A stream goes on after its
    first piece when `goes_on` is set.
    """

    def __init__(self) -> None:
        self.asked: GenerateRequest | None = None
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.answer, self.stream, self.load = (
            SimpleNamespace(remote=call) for call in (self._answer, self._stream, self._load)
        )

    def options(self, **_: Any) -> Hello:
        return self

    async def _load(self, *_: Any) -> None:
        """Nothing, as answers are not an adapter's."""

    def broadcast(self, method: str) -> SimpleNamespace:
        """What its one replica says of itself."""
        assert method == "load_report"
        return SimpleNamespace(results_async=self._load_report)

    async def _load_report(self) -> list[ReplicaLoad]:
        return [LOAD]

    async def _answer(self, asked: GenerateRequest) -> Completion:
        self.asked = asked
        return Completion(StreamStart("digest", PROMPT_TOKENS), (Delta("hello", "stop", ANSWER_TOKENS),))

    def _stream(self, asked: GenerateRequest) -> _Stream:
        return _Stream(self._pieces(asked))

    async def _pieces(self, asked: GenerateRequest) -> AsyncIterator[StreamStart | Delta]:
        answer = await self._answer(asked)
        yield answer.start
        yield Delta("hel", None, 1)
        while not self.goes_on.is_set():
            await asyncio.sleep(0.01)
        yield Delta("lo", "stop", ANSWER_TOKENS)


class _Stream:
    """What stands for a streaming call."""

    def __init__(self, pieces: AsyncIterator[StreamStart | Delta]) -> None:
        self._pieces = pieces

    def __aiter__(self) -> AsyncIterator[StreamStart | Delta]:
        return self._pieces

    async def __anext__(self) -> StreamStart | Delta:
        return await anext(self._pieces)

    def cancel(self) -> None:
        pass


@contextmanager
def running_gateway(settings: Settings) -> Iterator[tuple[str, Hello, Any]]:
    """Yield its URL, the base that it serves as `tiny`, and itself."""
    base, port = Hello(), free_port()
    config = uvicorn.Config(lambda: None, port=port, log_level="warning", lifespan="off")
    server, gateways = uvicorn.Server(config), list[Any]()

    async def serve() -> None:
        admission = AdmissionServer(settings)
        handle = SimpleNamespace(admit=SimpleNamespace(remote=admission.admit))
        gateways.append(Gateway.__mro__[1](settings, {"tiny": base}, handle))  # without Serve's wrapper
        config.app = gateways[0].__serve_build_asgi_app__()
        await server.serve()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the gateway did not start"
            thread.join(0.01)
        yield f"http://127.0.0.1:{port}", base, gateways[0]
    finally:
        server.should_exit = True
        thread.join(20)
