"""Decide whether an answer may be looked for and kept, and for whom."""

import msgspec

from apps.accounts.callers import Caller


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """Say what the caller wants of the cache. ``force`` also caches answers that are drawn by chance."""

    read: bool = True
    write: bool = True
    force: bool = False


EVERYTHING = Wish()
NOTHING = Wish(read=False, write=False)


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Say what is done. ``scope`` is part of the key: nobody outside it finds the answer (C1)."""

    read: bool
    write: bool
    scope: str

    @property
    def is_off(self) -> bool:
        return not (self.read or self.write)


OFF = Policy(read=False, write=False, scope="")


def choose(wish: Wish, *, deterministic: bool, plan_scope: str, caller: Caller) -> Policy:
    """Return the policy for one request: what is drawn by chance is cached only when the caller asks for that."""
    if not (deterministic or wish.force):
        return OFF
    return Policy(read=wish.read, write=wish.write, scope=name_scope(plan_scope, caller))


def name_scope(plan_scope: str, caller: Caller) -> str:
    """Name who shares answers. A browser session has no key: a person's chats share with nobody else then."""
    if plan_scope == "site":
        return "site"
    organization = f"organization:{caller.organization_id}"
    if plan_scope == "organization":
        return organization
    return f"{organization}/{f'key:{caller.key_id}' if caller.key_id else f'user:{caller.user_id}'}"


def read_cache_control(header: str | None) -> Wish:
    """Understand ``Cache-Control``: ``no-store`` neither looks nor keeps, ``no-cache`` makes a new answer and keeps it."""
    directives = {part.strip().partition("=")[0].lower() for part in (header or "").split(",")}
    if "no-store" in directives:
        return NOTHING
    return Wish(read="no-cache" not in directives)
