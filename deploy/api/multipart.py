"""A form with a file in it, as it comes: the file goes to disk piece by piece, and is never in memory as a whole.

form = FileForm("file", target)
await form.read(request, most=10 * 2**30)
form.filename, form.size, form.sha256, form.fields
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any, BinaryIO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from deploy.api.errors import ApiError

_PIECE_BYTES = 2 * 2**20  # that are written and hashed at a time, in a thread
_FIELDS_BYTES = 64 * 2**10  # of all that is no file, names and headers too
_CALLBACKS = (
    "on_part_begin", "on_header_field", "on_header_value", "on_header_end", "on_headers_finished", "on_part_data",
    "on_part_end", "on_end",
)  # fmt: skip


class FileForm:
    """A form whose field `file_field` is a file, which is written to `target`."""

    def __init__(self, file_field: str, target: BinaryIO) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.size = 0
        self._file_field, self._target, self._digest = file_field, target, hashlib.sha256()
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value, self._text = bytearray(), bytearray(), bytearray()
        self._field, self._text_bytes = "", 0
        self._in_file = self._ended = False
        self._pieces: list[bytes] = []

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    async def read(self, request: Request, most: int) -> None:
        """Read the whole form; its file has at most `most` bytes.

        Raises:
            ApiError: it is no form, has no file or ends too early (400), or is too large (413).
        """
        kind, options = parse_options_header(request.headers.get("content-type"))
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise ApiError(400, "the body must be a form: multipart/form-data with a boundary", "invalid_value")
        callbacks: Any = {name: getattr(self, name) for name in _CALLBACKS}
        parser = MultipartParser(options[b"boundary"], callbacks)
        try:
            async for chunk in request.stream():
                parser.write(chunk)
                if self.size > most:
                    raise too_large(most, self._file_field)
                if sum(map(len, self._pieces)) >= _PIECE_BYTES:
                    await self._write()
        except FormParserError as error:
            raise ApiError(400, f"the body is no form: {error}", "invalid_value") from error
        await self._write()
        if not self._ended:
            raise ApiError(400, "the form ends before its last boundary: send all of it", "invalid_value")
        if self.filename is None:
            message = f"{self._file_field} is missing: send it as a file"
            raise ApiError(400, message, "missing_parameter", self._file_field)

    async def _write(self) -> None:
        pieces, self._pieces = self._pieces, []

        def write() -> None:
            for piece in pieces:
                self._digest.update(piece)
                self._target.write(piece)

        await asyncio.to_thread(write)

    # What the parser calls.

    def on_part_begin(self) -> None:
        self._headers = {}
        self._count(1)  # an empty one is kept too

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[bytes(self._name).lower()] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._field = options.get(b"name", b"").decode(errors="replace")
        self._in_file = self._field == self._file_field and b"filename" in options
        if self._in_file:
            if self.filename is not None:
                raise ApiError(400, f"{self._field} is there twice: send one file", "invalid_value", self._field)
            self.filename = options[b"filename"].decode(errors="replace")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self.size += end - start
            self._pieces.append(data[start:end])
            return
        self._count(end - start)
        self._text += data[start:end]

    def on_part_end(self) -> None:
        if not self._in_file:
            self.fields[self._field] = self._text.decode(errors="replace")
        self._text.clear()

    def on_end(self) -> None:
        self._ended = True

    def _count(self, size: int) -> None:
        """Take so much into memory. Raises ApiError (413)."""
        self._text_bytes += size
        if self._text_bytes > _FIELDS_BYTES:
            message = f"all but {self._file_field} is larger than {_FIELDS_BYTES >> 10} KiB; send less"
            raise ApiError(413, message, "invalid_value", self._field or None)


def too_large(most: int, param: str) -> ApiError:
    """Return the refusal of what has more bytes than it may have."""
    size = f"{most >> 30} GiB" if most >= 2**30 else f"{most >> 20} MiB"
    return ApiError(413, f"{param} is larger than {size}: send it in parts, with /v1/uploads", "file_too_large", param)
