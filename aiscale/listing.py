"""Answer with lists in pages, as OpenAI does: ``limit``, ``after`` (an id), ``order``."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from django.db.models import QuerySet

from aiscale.errors import AiscaleError, Code


class Page(NamedTuple):
    """Say which part of a list is wanted."""

    limit: int
    after: str | None
    newest_first: bool


def read_page(query: dict[str, str], *, most: int, default: int) -> Page:
    """Read the parameters of a page. Raises: AiscaleError (INVALID_REQUEST)."""
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= most):
        raise AiscaleError(Code.INVALID_REQUEST, f"limit must be a number from 1 to {most}.", param="limit")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise AiscaleError(Code.INVALID_REQUEST, "order must be asc or desc.", param="order")
    return Page(int(text), query.get("after"), order == "desc")


def make_list(
    rows: QuerySet[Any],
    page: Page,
    describe: Callable[[Any], dict[str, Any]],
    prepare: Callable[[list[Any]], Any] | None = None,
) -> dict[str, Any]:
    """Return one page of rows, which have a public id. ``prepare`` sees them all before they are described one by one.

    I/O: one or two SQL statements. Raises: AiscaleError (NOT_FOUND)."""
    if page.after is not None:
        start = rows.filter(public_id=page.after).values_list("pk", flat=True).first()
        if start is None:
            raise _nowhere(page.after)
        rows = rows.filter(pk__lt=start) if page.newest_first else rows.filter(pk__gt=start)
    found = list(rows.order_by("-pk" if page.newest_first else "pk")[: page.limit + 1])
    if prepare is not None:
        prepare(found[: page.limit])
    return _word([describe(row) for row in found[: page.limit]], has_more=len(found) > page.limit)


def cut_list(items: Sequence[dict[str, Any]], page: Page) -> dict[str, Any]:
    """Return one page of objects that are all at hand, oldest first. Raises: AiscaleError (NOT_FOUND)."""
    ordered = list(reversed(items)) if page.newest_first else list(items)
    if page.after is not None:
        places = [place for place, item in enumerate(ordered) if item["id"] == page.after]
        if not places:
            raise _nowhere(page.after)
        ordered = ordered[places[0] + 1 :]
    return _word(ordered[: page.limit], has_more=len(ordered) > page.limit)


def _nowhere(after: str) -> AiscaleError:
    return AiscaleError(Code.NOT_FOUND, f"There is no {after[:60]!r} to list after.", param="after")


def _word(data: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": has_more}
