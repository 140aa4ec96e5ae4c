"""Pages of lists, as OpenAI's clients turn them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, Literal, TypeVar

from typing_extensions import TypedDict

Item = TypeVar("Item", bound=Mapping[str, object])


class Page(TypedDict, Generic[Item]):
    """The next page comes after `last_id`, where there are more."""

    object: Literal["list"]
    data: Sequence[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page(items: Sequence[Item], more: bool) -> Page[Item]:
    """Return these items, which have ids, as a page."""
    first, last = (str(items[at]["id"]) if items else None for at in (0, -1))
    return {"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": more}
