"""State what a worker is asked to do. Frozen structs, versioned; a worker refuses a version that it does not know."""

from typing import Literal

import msgspec

WIRE_VERSION = 1

GENERATE_TASK = "aiscale.generate"
ENCODE_TASK = "aiscale.encode"


class BillingTag(msgspec.Struct, frozen=True, kw_only=True):
    """Say who pays and at what price. The worker echoes it unread, so that settlement needs nothing but the last event.

    Prices are those of admission: a price that changes in between never changes a running request.
    """

    organization_id: str
    user_id: str | None = None
    key_id: str | None = None
    plan: str
    request_id: str
    source: Literal["api", "chat"]
    prompt_nanousd_per_token: int
    completion_nanousd_per_token: int
    hold_nanousd: int
    admitted_at_ms: int


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """Say how tokens are chosen. ``temperature`` 0 is greedy; equal seeds give equal tokens."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


class GenerateJob(msgspec.Struct, frozen=True, kw_only=True):
    """Ask for a completion of ``prompt_token_ids``.

    ``reply_to`` is the web process whose reply stream gets the events. ``keep_log`` also keeps them in the job's own
    log, from which a browser that reloads resumes. ``deadline_at_ms`` is epoch milliseconds.
    """

    job_id: str
    model: str
    model_version: str
    prompt_token_ids: list[int]
    sampling: Sampling
    billing: BillingTag
    reply_to: str
    deadline_at_ms: int
    keep_log: bool = False
    v: int = WIRE_VERSION


class EncodeJob(msgspec.Struct, frozen=True, kw_only=True):
    """Ask for one vector for each of ``inputs`` (token ids, special tokens included)."""

    job_id: str
    model: str
    model_version: str
    inputs: list[list[int]]
    billing: BillingTag
    reply_to: str
    deadline_at_ms: int
    v: int = WIRE_VERSION
