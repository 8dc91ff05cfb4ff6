"""Keep sessions in Postgres, with a fast copy in Redis that may be away: pages open, and people log in, all the same."""

import logging
from typing import Any

from django.contrib.sessions.backends import cached_db, db

from aiscale.redis import UNAVAILABLE

log = logging.getLogger(__name__)


class SessionStore(cached_db.SessionStore):
    """Be Django's own, which fails when the copy cannot be reached. Only deleting still fails then: who logs out must not stay in the
    copy. I/O: one Redis trip; SQL when the copy is missing."""

    def load(self) -> dict[str, Any]:
        try:
            return super().load()
        except UNAVAILABLE as error:
            _warn("read", error)
            found: dict[str, Any] = db.SessionStore.load(self)
            return found

    async def aload(self) -> dict[str, Any]:
        try:
            return await super().aload()
        except UNAVAILABLE as error:
            _warn("read", error)
            found: dict[str, Any] = await db.SessionStore.aload(self)
            return found

    def exists(self, session_key: str) -> bool:
        try:
            return bool(super().exists(session_key))
        except UNAVAILABLE as error:
            _warn("looked for", error)
            return bool(db.SessionStore.exists(self, session_key))

    def cycle_key(self) -> None:
        """Go on under another key. The old one's copy is of somebody who was not logged in, or has a hash that is no longer good."""
        try:
            super().cycle_key()
        except UNAVAILABLE as error:
            _warn("renewed", error)


def _warn(what: str, error: Exception) -> None:
    log.warning("a session is %s without Redis: %s", what, error)
