"""`/v1/webhook_endpoints`: OpenAI's, for the ends of fine-tuning jobs."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Annotated, Literal

import aiohttp
from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from deploy.api.errors import ApiError
from deploy.api.keys import caller_of, needs
from deploy.api.pages import Page, page
from deploy.api.webhook_sender import AddressRefusedError, WebhookSender, event_body
from jobs.store.api_keys import Scope
from jobs.store.webhooks import EVENT_TYPES, TooManyEndpointsError, WebhookEndpoint, WebhookTable

EventType = Literal["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
_Name = Annotated[str, Field(min_length=1, max_length=256)]
_Url = Annotated[str, Field(min_length=1, max_length=2048, description="https:// and a public address")]
_EventTypes = Annotated[list[EventType], Field(min_length=1)]


class NewEndpoint(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: _Name
    url: _Url
    event_types: _EventTypes


class ChangedEndpoint(BaseModel):
    """What is not given stays as it is."""

    model_config = ConfigDict(extra="forbid")

    name: _Name | None = None
    url: _Url | None = None
    event_types: _EventTypes | None = None


class Rotation(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keep_old_secret_active_for_24_hours: bool = False


class Sample(BaseModel):
    model_config = ConfigDict(extra="forbid")

    event_type: EventType


class Endpoint(TypedDict):
    """OpenAI's WebhookEndpoint."""

    id: str
    object: Literal["webhook_endpoint"]
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str


class EndpointWithSecret(Endpoint):
    """The secret is shown when it is made, and never again."""

    signing_secret: str


class DeletedEndpoint(TypedDict):
    id: str
    object: Literal["webhook_endpoint.deleted"]
    deleted: bool


class SampleResult(TypedDict):
    """What the endpoint answered."""

    object: Literal["webhook_endpoint.test"]
    webhook_endpoint_id: str
    event_type: str
    success: Literal[True]
    status_code: int


class EventTypes(TypedDict):
    object: Literal["list"]
    data: list[str]


class WebhookRoutes:
    """The routes on one table. `sender` says which addresses may be told anything."""

    def __init__(self, table: WebhookTable, sender: WebhookSender) -> None:
        self._table, self._sender = table, sender
        self.router = APIRouter(dependencies=[Depends(needs(Scope.TRAIN))], tags=["Webhooks"])
        endpoints, endpoint = "/v1/webhook_endpoints", "/v1/webhook_endpoints/{endpoint_id}"
        self.router.add_api_route(endpoints, self.create, methods=["POST"])
        self.router.add_api_route(endpoints, self.list)
        self.router.add_api_route(endpoint, self.retrieve)
        self.router.add_api_route(endpoint, self.update, methods=["POST"])
        self.router.add_api_route(endpoint, self.delete, methods=["DELETE"])
        self.router.add_api_route(f"{endpoint}/rotate_secret", self.rotate_secret, methods=["POST"])
        self.router.add_api_route(f"{endpoint}/test", self.test, methods=["POST"])
        self.router.add_api_route("/v1/webhook_event_types", self.event_types)

    async def create(self, request: Request, asked: NewEndpoint) -> EndpointWithSecret:
        """Have the ends of jobs told to a URL. The answer has the secret that signs what is sent."""
        await self._check(asked.url)
        new = (caller_of(request).tenant, asked.name, asked.url, asked.event_types)
        try:
            made = await asyncio.to_thread(self._table.create, *new)
        except TooManyEndpointsError as error:
            raise ApiError(409, str(error), "too_many_endpoints") from error
        return {**endpoint_object(made), "signing_secret": made.secret}

    async def list(
        self, request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> Page[Endpoint]:
        """List endpoints, the newest first."""
        tenant = caller_of(request).tenant
        found = [*await asyncio.to_thread(self._table.list, tenant)]
        if after is not None:
            last = await self._endpoint(request, after, "after")
            found = found[[one.id for one in found].index(last.id) + 1 :]
        return page([endpoint_object(one) for one in found[:limit]], len(found) > limit)

    async def retrieve(self, request: Request, endpoint_id: str) -> Endpoint:
        """Describe an endpoint, without its secret."""
        return endpoint_object(await self._endpoint(request, endpoint_id))

    async def update(self, request: Request, endpoint_id: str, asked: ChangedEndpoint) -> Endpoint:
        """Change an endpoint; what it is still to be told goes to where it is then."""
        endpoint, changes = await self._endpoint(request, endpoint_id), asked.model_dump(exclude_none=True)
        if asked.url is not None:
            await self._check(asked.url)
        if changes:
            await asyncio.to_thread(self._table.update, endpoint, **changes)
        return endpoint_object(await self._endpoint(request, endpoint_id))

    async def delete(self, request: Request, endpoint_id: str) -> DeletedEndpoint:
        """Delete an endpoint, with what it was still to be told."""
        endpoint = await self._endpoint(request, endpoint_id)
        await asyncio.to_thread(self._table.delete, endpoint)
        return {"id": endpoint.id, "object": "webhook_endpoint.deleted", "deleted": True}

    async def rotate_secret(
        self, request: Request, endpoint_id: str, asked: Rotation | None = None
    ) -> EndpointWithSecret:
        """Give an endpoint another secret."""
        endpoint = await self._endpoint(request, endpoint_id)
        keep = asked is not None and asked.keep_old_secret_active_for_24_hours
        await asyncio.to_thread(self._table.rotate, endpoint, keep)
        changed = await self._endpoint(request, endpoint_id)
        return {**endpoint_object(changed), "signing_secret": changed.secret}

    async def test(self, request: Request, endpoint_id: str, asked: Sample) -> SampleResult:
        """Send a sample of an event now, once, of a job that there is not."""
        endpoint = await self._endpoint(request, endpoint_id)
        event_id = f"evt_{secrets.token_hex(12)}"
        body = event_body(event_id, asked.event_type, time.time(), "job-000000000000")
        try:
            status = await self._sender.post(endpoint, event_id, body)
        except (OSError, ValueError, aiohttp.ClientError) as error:
            message = f"{endpoint.url} did not answer ({error or 'too slow'}): see that it can be reached from here"
            raise ApiError(400, message, "webhook_not_delivered") from error
        return {
            "object": "webhook_endpoint.test",
            "webhook_endpoint_id": endpoint.id,
            "event_type": asked.event_type,
            "success": True,
            "status_code": status,
        }

    async def event_types(self) -> EventTypes:
        """List what endpoints can be told."""
        return {"object": "list", "data": [*EVENT_TYPES]}

    async def _check(self, url: str) -> None:
        """Raise ApiError (400) where nothing could be sent to this URL."""
        try:
            await self._sender.check(url)
        except (ValueError, OSError) as error:
            reason = error if isinstance(error, AddressRefusedError) else f"it cannot be used ({error}); correct it"
            raise ApiError(400, f"url: {reason}", "invalid_value", "url") from error

    async def _endpoint(self, request: Request, endpoint_id: str, param: str = "endpoint_id") -> WebhookEndpoint:
        found = await asyncio.to_thread(self._table.find, caller_of(request).tenant, endpoint_id)
        if found is None:
            message = f"there is no webhook endpoint {endpoint_id!r}; see /v1/webhook_endpoints"
            raise ApiError(404, message, "webhook_endpoint_not_found", param)
        return found


def endpoint_object(endpoint: WebhookEndpoint) -> Endpoint:
    return {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "created_at": int(endpoint.created_at),
        "updated_at": int(endpoint.updated_at),
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": [*endpoint.event_types],
        "signing_secret_hint": f"whsec_...{endpoint.secret[-4:]}",
    }
