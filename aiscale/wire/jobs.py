"""State what a worker is asked to do. Frozen structs, versioned; a worker refuses a version that it does not know."""

from typing import Literal

import msgspec

WIRE_VERSION = 2

GENERATE_TASK = "aiscale.generate"
ENCODE_TASK = "aiscale.encode"
LOCAL_PROVIDER = "local"
"""Who computes what our own workers compute; kill switches name providers."""


class BillingTag(msgspec.Struct, frozen=True, kw_only=True):
    """Say who pays and at what price. The worker echoes it unread, so that settlement needs nothing but the last event.

    Prices are those of admission: a price that changes in between never changes a running request. ``price_id`` names their row;
    ``cached_prompt_nanousd_per_token`` None means the same as for any other prompt token; ``request_nanousd`` is the flat part.
    """

    organization_id: str
    user_id: str | None = None
    key_id: str | None = None
    plan: str
    request_id: str
    source: Literal["api", "chat", "batch"]
    prompt_nanousd_per_token: int
    completion_nanousd_per_token: int
    hold_nanousd: int
    admitted_at_ms: int
    price_id: str = ""
    cached_prompt_nanousd_per_token: int | None = None
    request_nanousd: int = 0
    price_percent: int = 100
    """What the plan asks, of the model's price, for what was in the answer cache; the prices here are what they are after that."""
    hold_tokens: int = 0
    """How many tokens were counted at ``admitted_at_ms``, at the most; what was not used is given back."""
    provider: str = LOCAL_PROVIDER
    is_internal: bool = False
    """Whether we ask it for reasons of our own, such as the screening of a message: it costs nothing, and is on nobody's bill."""


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """Bound what an answer may be: ``source`` is a JSON schema, or a Lark grammar as llguidance reads it."""

    kind: Literal["json_schema", "lark"]
    source: str


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """Say how tokens are chosen. ``temperature`` 0 is greedy; equal seeds give equal tokens.

    ``max_tokens`` holds for each of the ``n`` choices. The filters are applied in this order: penalties, bias and grammar, temperature,
    ``top_k`` (0: all), ``top_p``, ``min_p``. Presence and frequency penalties look at the answer, ``repetition_penalty`` (1: none)
    at the prompt too. ``top_logprobs`` None: no logprobs are told; else those of the chosen token and of so many likeliest ones.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    top_logprobs: int | None = None
    grammar: Grammar | None = None
    keep_control_tokens: bool = False
    """Show the text of control tokens, such as those around a tool call."""


class GenerateJob(msgspec.Struct, frozen=True, kw_only=True):
    """Ask for a completion of ``prompt_token_ids``.

    ``reply_to`` is the web process whose reply stream gets the events. ``keep_log`` also keeps them in the job's own
    log, from which a browser that reloads resumes. ``deadline_at_ms`` is epoch milliseconds. ``prefix_scope``: the keys and values of
    a prompt's beginning are reused only between jobs of equal scope (an organization's id, or ``site``); '' reuses none.
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
    prefix_scope: str = ""
    v: int = WIRE_VERSION


class EncodeJob(msgspec.Struct, frozen=True, kw_only=True):
    """Ask for one vector for each of ``inputs`` (token ids, special tokens included).

    The request has ``cached_tokens`` more, in texts whose vectors are known: they are not computed, and paid for as cached ones.
    """

    job_id: str
    model: str
    model_version: str
    inputs: list[list[int]]
    billing: BillingTag
    reply_to: str
    deadline_at_ms: int
    cached_tokens: int = 0
    v: int = WIRE_VERSION
