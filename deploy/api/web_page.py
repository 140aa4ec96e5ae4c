"""The page at `/`: files that are sent as they are. What it shows it asks of the API, as any client does."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from mimetypes import guess_type

from fastapi import APIRouter, Request
from fastapi.responses import Response

_HEADERS = {
    # Nothing is loaded from elsewhere or sent there, no script stands in the page, and no other page has it in a frame.
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # but a page that is the same is not sent again
}


class WebPage:
    """The routes, open to all: who has no key is asked for one on the page."""

    def __init__(self) -> None:
        self._files = dict(_contents(files("deploy") / "web"))

    def router(self) -> APIRouter:
        """Return one route a file."""
        router = APIRouter()
        for name in self._files:
            path = "/" if name == "index.html" else f"/web/{name}"
            router.add_api_route(path, self._sender(name), include_in_schema=False)
        return router

    def _sender(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        content, etag = self._files[name], f'"{hashlib.sha256(self._files[name]).hexdigest()}"'
        kind = guess_type(name)[0] or "text/plain"

        async def send(request: Request) -> Response:
            if request.headers.get("if-none-match") == etag:
                return Response(status_code=304, headers={**_HEADERS, "etag": etag})
            return Response(content, media_type=kind, headers={**_HEADERS, "etag": etag})

        return send


def _contents(folder: Traversable, path: str = "") -> Iterator[tuple[str, bytes]]:
    """Yield each file below a folder, by its path."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _contents(entry, f"{path}{entry.name}/")
        else:
            yield path + entry.name, entry.read_bytes()
