"""State what a worker says back. Events of one job are numbered from 0 without a gap; `Finished` is always the last, and
comes exactly once (see ``aiscale/wire/lua/finish.lua``).
"""

from typing import Literal

import msgspec

from aiscale.wire.jobs import BillingTag

FinishReason = Literal["stop", "length", "cancelled", "killed", "deadline", "error"]

RELAY = "relay-"
"""The ids of web processes that have an upstream answer, as of workers, begin so."""


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """A worker took the job. Sent again, with a higher ``attempt``, when another worker had to take over."""

    job_id: str
    seq: int
    worker_id: str
    attempt: int


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Tell how likely the model found a token (natural logarithm, before temperature and filters), and what else it considered."""

    data: bytes
    """The token's own bytes, perhaps no whole character."""
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


class ToolCallPart(msgspec.Struct, frozen=True, kw_only=True):
    """Tell of a call to one of the caller's tools: the first part has ``id`` and ``name``; ``arguments`` (JSON) may come in pieces."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class Delta(msgspec.Struct, frozen=True, kw_only=True, tag="delta"):
    """New text since the last event. ``completion_tokens`` counts all tokens made so far, of all choices.

    ``index`` names the choice. ``end`` is set on the last delta of a choice when the job has several; the end of a job's only choice
    is told by `Finished`. ``tool_calls`` come from upstreams; our own models' are in ``text`` until `Run` reads them.
    ``made_at_ms`` is when our engine had the token (0: it was none of ours), by the worker's clock.
    """

    job_id: str
    seq: int
    text: str
    completion_tokens: int
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    end: Literal["stop", "length"] | None = None
    tool_calls: tuple[ToolCallPart, ...] = ()
    made_at_ms: int = 0


class Encoded(msgspec.Struct, frozen=True, kw_only=True, tag="encoded"):
    """The vectors of an EncodeJob: float32, C order, ``[count, dimensions]``; inline, or under ``result_key`` when large (S4)."""

    job_id: str
    seq: int
    count: int
    dimensions: int
    vectors: bytes | None = None
    result_key: str | None = None


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """The end of a job, however it ended, with all that settlement and transcripts need.

    What was made is paid for, whoever stopped it; an ``error`` is not charged. ``text`` is the whole answer of a job
    with ``keep_log`` (its first choice, bounded by the model's context), else None. ``completion_tokens`` counts all choices;
    ``stop_sequence`` is the stop string that ended the first choice;
    ``cached_tokens`` are those of ``prompt_tokens`` whose keys and values, or vectors, were there already. ``cache`` is the level of the
    answer cache that gave the whole answer ('' = it was computed), and ``saved_nanousd`` how much less than computing it that costs.
    """

    job_id: str
    seq: int
    kind: Literal["generate", "encode"]
    model: str
    model_version: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    billing: BillingTag
    cached_tokens: int = 0
    cache: str = ""
    saved_nanousd: int = 0
    stop_sequence: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    text: str | None = None
    worker_id: str = ""
    queued_ms: int = 0
    first_token_ms: int | None = None
    duration_ms: int = 0
    finished_at_ms: int = 0


Event = Started | Delta | Encoded | Finished


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """An order to every process, sent on ``keys.CONTROL_CHANNEL``.

    ``cancel``: drop ``job_id``. ``kill``: end and refuse everything of ``scope`` (see ``aiscale.wire.scopes``).
    ``release``: the scope works again. ``refresh``: the named Redis or in-process copy (``scope`` = ``key:<digest>``,
    ``plan:<slug>``, ``catalog`` ...) is stale. ``work``: jobs of ``scope`` = ``model:<slug>`` wait, and the worker that was called
    is busy.
    """

    order: Literal["cancel", "kill", "release", "refresh", "work"]
    job_id: str = ""
    scope: str = ""
    reason: str = ""
