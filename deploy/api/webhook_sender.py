"""Sends webhooks as Standard Webhooks has it, which OpenAI's client verifies.

    webhook-id: evt_...
    webhook-timestamp: 1780000000
    webhook-signature: v1,<base64 of HMAC-SHA256(secret, id.timestamp.body)>

An address is judged when a socket is made for it, so that no name can mean another one in between: private ones are
refused, but for networks that the operator has named. Redirects are not followed, and of an answer nothing but its
status is read.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import socket
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

import aiohttp
from standardwebhooks import Webhook
from yarl import URL

from cluster.settings import Network
from jobs.store.webhooks import Delivery, WebhookEndpoint, WebhookTable

log = logging.getLogger("ray.serve.lora")

_LOOK_SECONDS = 1.0
_SEND_SECONDS = 15.0  # for all of a request: looking up, connecting, sending, and the status of its answer
_AT_A_TIME, _OF_A_TENANT_AT_A_TIME, _OF_ONE_AT_A_TIME = 32, 8, 4  # so that who does not answer holds up no others
_TRANSLATED = [
    ipaddress.ip_network(text)
    for text in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96", "fec0::/10")
]
"""IPv6 networks whose addresses stand for IPv4 ones, private ones too; and what was private before fc00::/7 was."""


class AddressRefusedError(OSError):
    """An address that is not to be connected to; the sentence says why."""


class WebhookSender:
    """Sends what the table says, and tests an endpoint. `allowed` are private networks that may be connected to."""

    def __init__(self, table: WebhookTable, allowed: Sequence[Network]) -> None:
        self._table, self._allowed = table, allowed
        self._sending: dict[asyncio.Task[None], WebhookEndpoint] = {}  # and the endpoint of each

    async def check(self, text: str) -> None:
        """See whether something could be sent to this URL now.

        Raises:
            ValueError: it is no URL, with the reason.
            AddressRefusedError: it leads to an address that is not to be connected to.
            OSError, TimeoutError: its host is not found.
        """
        url = URL(text)
        if url.scheme not in ("https", "http") or not url.raw_host or url.raw_user is not None:
            raise ValueError("write https://, a host and perhaps a path, without a user")
        async with asyncio.timeout(_SEND_SECONDS):
            looked_up = asyncio.get_running_loop().getaddrinfo(url.raw_host, url.port, type=socket.SOCK_STREAM)
            for *_, address in await looked_up:
                self._judge(url, str(address[0]))

    async def post(self, endpoint: WebhookEndpoint, event_id: str, body: str) -> int:
        """Send one event; return the status of the answer.

        Raises:
            OSError, TimeoutError, aiohttp.ClientError: there was no answer, or its address is not to be connected to.
        """
        async with asyncio.timeout(_SEND_SECONDS):
            url, now = URL(endpoint.url), datetime.now(UTC)
            signatures = [Webhook(secret).sign(event_id, now, body) for secret in endpoint.secrets(now.timestamp())]
            headers = {
                "content-type": "application/json",
                "user-agent": "ray-lora",
                "webhook-id": event_id,
                "webhook-timestamp": str(int(now.timestamp())),
                "webhook-signature": " ".join(signatures),
            }

            def connecting(address: aiohttp.AddrInfoType) -> socket.socket:
                self._judge(url, str(address[4][0]))
                return socket.socket(*address[:3])

            connector = aiohttp.TCPConnector(socket_factory=connecting, use_dns_cache=False, force_close=True)
            async with (
                aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session,
                session.post(url, data=body.encode(), headers=headers, allow_redirects=False) as answer,
            ):
                return answer.status

    async def follow(self) -> None:
        """Send what is due, for ever."""
        while True:
            try:
                if await self._begin_due():
                    continue
            except Exception as error:  # whatever it is, it is tried again
                log.warning("event=webhooks_not_read error=%r", error)
            await asyncio.sleep(_LOOK_SECONDS)

    def _judge(self, url: URL, address: str) -> None:
        """Raise AddressRefusedError where an address is not to be connected to."""
        try:
            found = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            raise AddressRefusedError(f"{address} is no whole address: write a name, or all four numbers") from None
        mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
        found = mapped or found
        if any(found in network for network in self._allowed):
            return
        if url.scheme != "https":
            raise AddressRefusedError("it must begin with https://")
        if not found.is_global or found.is_multicast or any(found in network for network in _TRANSLATED):
            log.info("event=webhook_refused host=%s address=%s", url.host, found)  # tenants learn no inner addresses
            raise AddressRefusedError(
                "it leads to a private address: give a public one, or have your operator name that network in"
                " LORA_WEBHOOK_NETWORKS"
            )

    async def _begin_due(self) -> bool:
        """Begin to send some of what is due; return whether there may be more."""
        of_endpoints = Counter(endpoint.id for endpoint in self._sending.values())
        of_tenants = Counter(endpoint.tenant for endpoint in self._sending.values())
        busy = [endpoint for endpoint, number in of_endpoints.items() if number >= _OF_ONE_AT_A_TIME]
        tenants = [tenant for tenant, number in of_tenants.items() if number >= _OF_A_TENANT_AT_A_TIME]
        room = min(_AT_A_TIME - len(self._sending), _OF_ONE_AT_A_TIME)
        claimed = await asyncio.to_thread(self._table.claim, room, busy, tenants) if room > 0 else []
        for delivery in claimed:
            task = asyncio.get_running_loop().create_task(self._deliver(delivery))
            self._sending[task] = delivery.endpoint
            task.add_done_callback(self._sending.pop)
        return 0 < room == len(claimed)

    async def _deliver(self, delivery: Delivery) -> None:
        body = event_body(delivery.id, delivery.event_type, delivery.created_at, delivery.job_id)
        try:
            status = await self.post(delivery.endpoint, delivery.id, body)
            reason = f"status {status}"
        except Exception as error:  # whatever it is, it is tried again
            status, reason = 0, repr(error)
        try:
            if 200 <= status < 300:
                await asyncio.to_thread(self._table.delivered, delivery.id)
                return
            again = await asyncio.to_thread(self._table.put_off, delivery)
            event = "webhook_put_off" if again else "webhook_given_up"
            told = (event, delivery.endpoint.id, delivery.job_id, delivery.attempts, reason)
            log.warning("event=%s endpoint=%s job=%s attempts=%d reason=%s", *told)
        except Exception as error:  # the claim runs out, and it is tried again
            log.warning("event=webhook_not_noted endpoint=%s error=%r", delivery.endpoint.id, error)


def event_body(event_id: str, event_type: str, created_at: float, job_id: str) -> str:
    """Return OpenAI's event."""
    head = {"id": event_id, "object": "event", "created_at": int(created_at), "type": event_type}
    return json.dumps(head | {"data": {"id": job_id}}, separators=(",", ":"))
