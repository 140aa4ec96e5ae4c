"""How a decode loop's tokens reach those who wait: in order, in few messages, and whoever has waited longest first."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from deploy.serving.decode_loop import _together
from deploy.serving.outbox import Outbox, Receiver
from lora_core.inference.generation import GeneratedToken


def test_streams_share_the_messages_and_lose_nothing() -> None:
    """64 of them at 128 tokens/s, where 2,560 messages/s are sent: each has a message every third or fourth token."""

    async def streams() -> None:
        outbox = Outbox[int](rate=2560)
        receivers = [Receiver[int]() for _ in range(64)]
        received: dict[Receiver[int], list[list[int]]] = {receiver: [] for receiver in receivers}
        sent_after: Counter[int] = Counter()
        for token in range(101):
            for receiver in receivers:
                outbox.add(receiver, token, urgent=token in (0, 100))
            outbox.flush(token / 128)
            await asyncio.sleep(0)
            for receiver, messages in received.items():
                if receiver._messages.qsize():
                    messages.append(await receiver.receive())
                    sent_after[token] += 1
        for messages in received.values():
            assert [token for message in messages for token in message] == list(range(101))
            assert len(messages[0]) == 1 and set(map(len, messages[2:-1])) <= {3, 4}
        assert sent_after[0] == sent_after[100] == 64
        assert {sent_after[token] for token in range(2, 100)} == {20}

    asyncio.run(streams())


def test_few_streams_have_each_token_at_once_and_who_leaves_has_no_more() -> None:
    async def streams() -> None:
        outbox = Outbox[int](rate=1000)
        staying, leaving = Receiver[int](), Receiver[int]()
        for token in range(5):
            outbox.add(staying, token, urgent=False)
            outbox.add(leaving, token, urgent=token == 2)
            if token == 2:
                outbox.drop(leaving)
            outbox.flush(1 + token / 100)
        await asyncio.sleep(0)
        assert staying._messages.qsize() == 5 and leaving._messages.qsize() == 4
        assert await staying.receive() == [0, 1, 2, 3, 4]
        assert await leaving.receive() == [0, 1, 3, 4]

    asyncio.run(streams())


def test_tokens_that_come_with_an_error_are_told_before_it() -> None:
    async def stream() -> None:
        outbox, receiver = Outbox[Any](rate=1000), Receiver[Any]()
        first, last = GeneratedToken(1, 5, "a", None, 1), GeneratedToken(2, 6, "b", "stop", 1)
        for event in ((0, first), (1, last), KeyError("broken")):
            outbox.add(receiver, event, urgent=isinstance(event, Exception))
        outbox.flush(0.0)
        tokens = _together(receiver, choices=2)
        assert await anext(tokens) == [(0, first), (1, last)]
        with pytest.raises(KeyError, match="broken"):
            await anext(tokens)

    asyncio.run(stream())
