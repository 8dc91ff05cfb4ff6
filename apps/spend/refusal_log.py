"""Remember which requests were refused and why, without letting a flood of them fill anything.

`note` costs the request a few microseconds: it counts the refusal and, up to a few a minute for each organization and code, keeps it. A
thread sends both to a capped stream each half second; settlement's process writes them down (`run`). What is kept one by one is a sample
in a flood, and the truth otherwise; the counts are of all. All of it is comfort: what is lost with a process or a full stream is
lost, and no answer waits for it.
"""

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from apps.accounts.callers import Caller

log = logging.getLogger(__name__)

FLUSH_EACH_S = 0.5
KEPT_A_MINUTE = 30
"""Of one organization and code, in one process."""
KEPT_A_FLUSH = 50
"""Of everybody, in one process: a hundred a second."""
MOST_COUNTERS = 2_000
UNKNOWN = ""
AFTER_ADMISSION = frozenset({Code.WORKER_LOST, Code.ENGINE_FAILED, Code.DEADLINE_EXCEEDED, Code.CANCELLED})
"""These ended a request that was let in: its usage record tells of them."""


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """State one refusal. Times are epoch milliseconds."""

    request_id: str
    organization_id: str
    user_id: str
    key_id: str
    plan: str
    source: str
    model: str
    code: str
    message: str
    param: str
    facts: dict[str, str]
    occurred_at_ms: int


class RefusedBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Carry what one process refused in half a second: counts by (organization, code), and a sample."""

    counts: list[tuple[str, str, int]]
    kept: list[Refused]
    at_ms: int


def encode(batch: RefusedBatch) -> bytes:
    return msgspec.msgpack.encode(batch)


class Notes:
    """Collect refusals of one process until they are sent: by a thread of its own, or when somebody calls `flush`. For use by several
    threads."""

    def __init__(self, *, sends_itself: bool = True) -> None:
        self._sends_itself = sends_itself
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._kept: list[Refused] = []
        self._minute = 0
        self._quota: Counter[tuple[str, str]] = Counter()
        self._waiting = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, refused: Refused) -> None:
        """Count a refusal, and keep it if there is room. I/O: none."""
        name = (refused.organization_id, refused.code)
        minute = refused.occurred_at_ms // 60_000
        with self._lock:
            if minute != self._minute:
                self._minute = minute
                self._quota.clear()
            if name not in self._counts and len(self._counts) >= MOST_COUNTERS:
                name = (UNKNOWN, refused.code)
            self._counts[name] += 1
            if self._quota[name] < KEPT_A_MINUTE and len(self._kept) < KEPT_A_FLUSH:
                self._quota[name] += 1
                self._kept.append(refused)
            if self._sends_itself and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._run, name="refusals", daemon=True)
                self._thread.start()
        self._waiting.set()

    def take(self) -> RefusedBatch | None:
        """Return what was collected and begin anew; None when that is nothing."""
        with self._lock:
            if not self._counts:
                return None
            counts = [(organization_id, code, count) for (organization_id, code), count in self._counts.items()]
            batch = RefusedBatch(counts=counts, kept=self._kept, at_ms=_now_ms())
            self._counts, self._kept = Counter(), []
            return batch

    def flush(self) -> None:
        """Send what was collected. I/O: one Redis trip. What cannot be sent is lost."""
        batch = self.take()
        if batch is None:
            return
        try:
            redis_clients.get_sync().xadd(
                keys.REFUSED, {"0": encode(batch)}, maxlen=keys.REFUSED_MAXLEN, approximate=True
            )
        except redis_clients.UNAVAILABLE as error:
            log.warning("refusals could not be noted: %s", error)

    def _run(self) -> None:
        while self._waiting.wait(60):
            time.sleep(FLUSH_EACH_S)
            self._waiting.clear()
            self.flush()


NOTES = Notes()


def note(request_id: str, error: AiscaleError, *, source: str, caller: Caller | None = None, model: str = "") -> None:
    """Remember that a request was refused. Never raises, and waits for nobody. I/O: none."""
    if error.code in AFTER_ADMISSION:
        return
    facts = {_text(name, 40): _text(value, 200) for name, value in list(error.facts.items())[:20]}
    NOTES.add(
        Refused(
            request_id=_text(request_id, 128),
            organization_id=caller.organization_id if caller else "",
            user_id=(caller.user_id if caller else None) or "",
            key_id=(caller.key_id if caller else None) or "",
            plan=_text(facts.pop("plan", "") or (caller.plan if caller else ""), 64),
            source=source,
            model=_text(facts.pop("model", "") or model, 128),
            code=error.code.value,
            message=_text(error.message, 1000),
            param=_text(error.param or "", 64),
            facts=facts,
            occurred_at_ms=_now_ms(),
        )
    )


def describe_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a refusal's numbers as numbers, where they are some."""
    return {
        name: int(value) if re.fullmatch(r"-?[0-9]{1,18}", str(value)) else value
        for name, value in facts.items()
        if value
    }


def _text(value: object, most: int) -> str:
    return str(value).replace("\0", "").encode("utf-8", "replace").decode()[:most]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
