"""Answer with lists in pages, as OpenAI does: ``limit``, ``after`` (an id), ``order``."""

from collections.abc import Callable
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
            raise AiscaleError(Code.NOT_FOUND, f"There is no {page.after[:60]!r} to list after.", param="after")
        rows = rows.filter(pk__lt=start) if page.newest_first else rows.filter(pk__gt=start)
    found = list(rows.order_by("-pk" if page.newest_first else "pk")[: page.limit + 1])
    if prepare is not None:
        prepare(found[: page.limit])
    data = [describe(row) for row in found[: page.limit]]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": len(found) > page.limit}
