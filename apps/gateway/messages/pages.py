"""Answer with lists in pages, as Anthropic does: ``limit``, ``after_id``, ``before_id``."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from django.db.models import QuerySet

from aiscale.errors import AiscaleError, Code

PARAMETERS = ("limit", "after_id", "before_id")
MOST, DEFAULT = 1_000, 20


class Page(NamedTuple):
    """Say which part of a list is wanted: what follows one of its ids, or what comes right before one."""

    limit: int
    after_id: str | None = None
    before_id: str | None = None


def read_page(query: dict[str, str], *, default: int = DEFAULT) -> Page:
    """Read the parameters of a page. Raises: AiscaleError (INVALID_REQUEST)."""
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= MOST):
        raise AiscaleError(Code.INVALID_REQUEST, f"limit must be a number from 1 to {MOST}.", param="limit")
    page = Page(int(text), query.get("after_id"), query.get("before_id"))
    if page.after_id is not None and page.before_id is not None:
        raise AiscaleError(Code.INVALID_REQUEST, "Send after_id or before_id, not both.", param="before_id")
    return page


def cut(items: Sequence[dict[str, Any]], page: Page) -> dict[str, Any]:
    """Return one page of objects that are all at hand. Raises: AiscaleError (NOT_FOUND) for an id that none of them has."""
    ids = [item["id"] for item in items]
    if page.before_id is not None:
        before = items[: _find(ids, page.before_id, "before_id")]
        return word(before[-page.limit :], has_more=len(before) > page.limit)
    rest = items if page.after_id is None else items[_find(ids, page.after_id, "after_id") + 1 :]
    return word(rest[: page.limit], has_more=len(rest) > page.limit)


def make_list(rows: QuerySet[Any], page: Page, describe: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Return one page of rows, which have a public id, newest first. I/O: one or two SQL statements. Raises: AiscaleError (NOT_FOUND)."""
    for wanted_id, param in ((page.after_id, "after_id"), (page.before_id, "before_id")):
        if wanted_id is None:
            continue
        start = rows.filter(public_id=wanted_id).values_list("pk", flat=True).first()
        if start is None:
            raise refuse_id(wanted_id, param)
        rows = rows.filter(pk__lt=start) if param == "after_id" else rows.filter(pk__gt=start)
    found = list(rows.order_by("-pk" if page.before_id is None else "pk")[: page.limit + 1])
    data = [describe(row) for row in found[: page.limit]]
    return word(data if page.before_id is None else data[::-1], has_more=len(found) > page.limit)


def word(data: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """Say what is on a page, and whether there is more in the direction in which it was asked for."""
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"data": data, "has_more": has_more, **ends}


def refuse_id(item_id: str, param: str) -> AiscaleError:
    """Make the refusal of an id that nothing in the list has."""
    return AiscaleError(Code.NOT_FOUND, f"There is no {item_id[:60]!r} in this list.", param=param)


def _find(ids: list[str], item_id: str, param: str) -> int:
    if item_id not in ids:
        raise refuse_id(item_id, param)
    return ids.index(item_id)
