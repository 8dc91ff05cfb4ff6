"""Look at what is said to a model before it is asked, as the caller's plan wishes: let it pass, note it, or refuse it."""

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.observability import SCREENINGS
from apps.accounts.callers import Caller, PlanLimits, on_thread
from apps.inference import encodings, moderation, presence
from apps.inference.catalog import CatalogModel
from apps.inference.completions import CompletionRequest
from apps.inference.models import ModerationFlag

log = logging.getLogger(__name__)

HEADER = "x-aiscale-moderation"
DEADLINES_S = {"flag": 1.0, "block": 5.0}
"""How long a check may take: who passes messages on all the same does not wait long for a worker that is in trouble."""
REST_S = 5.0
"""How long no check is tried after one that nobody answered: a worker that hangs must not cost each request its deadline."""
UNANSWERED = frozenset({Code.BACKEND_UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.WORKER_LOST})
KNOWN_MAX = 20_000
SUFFIX = "_m"

_known: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()
"""What texts are flagged for, by model version and text: a conversation is sent again with each turn."""
_rests_until = 0.0


async def screen(
    request: CompletionRequest,
    caller: Caller,
    plan: PlanLimits,
    release: Callable[[], Awaitable[None]],
    prompt: str = "",
) -> dict[str, str]:
    """Check an admitted request's messages, all but the model's own. Returns headers that tell what was noted.

    ``prompt`` is the text that a request goes on from. ``release`` gives the request's hold back and is called before anything is raised.
    I/O: none for a plan without checks and for texts that are known; else one encoder job. Raises: AiscaleError
    (CONTENT_POLICY_VIOLATION; MODERATION_UNAVAILABLE when nothing can be checked and the plan refuses what is flagged).
    """
    if plan.moderation == "off":
        return {}
    try:
        return await _screen(request, caller, plan, prompt)
    except BaseException:
        await asyncio.shield(release())
        raise


async def _screen(request: CompletionRequest, caller: Caller, plan: PlanLimits, prompt: str) -> dict[str, str]:
    said = [message.content for message in request.messages if message.role != "assistant"]
    texts = [text for text in (*said, prompt) if text.strip()]
    try:
        labels = await find_labels(texts, request, caller, DEADLINES_S[plan.moderation]) if texts else ()
    except (AiscaleError, *redis_clients.UNAVAILABLE) as error:
        return _go_on_unchecked(request, plan, error)
    if not labels:
        SCREENINGS.labels(plan.slug, "passed").inc()
        return {}
    blocked = plan.moderation == "block"
    SCREENINGS.labels(plan.slug, "blocked" if blocked else "flagged").inc()
    await _note(request, caller, "block" if blocked else "flag", labels)
    if not blocked:
        return {HEADER: f"flagged; {', '.join(labels)}"}
    raise AiscaleError(
        Code.CONTENT_POLICY_VIOLATION,
        f"This service does not pass on messages like this one: it looks like {_list_words(labels)}. Nothing was charged. "
        "Say it in other words, or ask the administrator of this service if you think this is a mistake.",
        param="messages",
    )


async def find_labels(
    texts: list[str], request: CompletionRequest, caller: Caller, deadline_s: float
) -> tuple[str, ...]:
    """Return what texts of a request are flagged for; empty for nothing. I/O: one encoder job, for texts not yet known.

    Raises: AiscaleError, redis.exceptions.RedisError, OSError.
    """
    global _rests_until
    if time.monotonic() < _rests_until:
        raise AiscaleError(Code.MODERATION_UNAVAILABLE, "The check of messages rests after a failure.")
    model = await moderation.get_model()
    try:
        marks = {text: _mark(model, text) for text in texts}
        fresh = [text for text in marks if marks[text] not in _known]
        if fresh:
            verdicts = await _ask(model, fresh, request, caller, deadline_s)
            for text, found in zip(fresh, verdicts, strict=True):
                _known[marks[text]] = found
    except (AiscaleError, *redis_clients.UNAVAILABLE) as error:
        # a text on which the model fails says nothing of the next one
        if not isinstance(error, AiscaleError) or error.code in UNANSWERED:
            _rests_until = time.monotonic() + REST_S
        raise
    labels = {label for mark in marks.values() for label in _known[mark]}
    while len(_known) > KNOWN_MAX:
        _known.popitem(last=False)
    return tuple(sorted(labels))


def forget() -> None:
    """Drop what is known of texts and failures."""
    global _rests_until
    _known.clear()
    _rests_until = 0.0
    presence.forget()


async def _ask(
    model: CatalogModel, texts: list[str], request: CompletionRequest, caller: Caller, deadline_s: float
) -> list[tuple[str, ...]]:
    if not await presence.is_served(model.slug, model.version):
        raise AiscaleError(Code.MODERATION_UNAVAILABLE, f"No worker serves the model {model.slug!r}.")
    pieces, owners = await moderation.read(model, texts)
    rows = await encodings.encode_for_us(
        model,
        pieces,
        caller,
        request_id=request.request_id,
        source=request.source,
        suffix=SUFFIX,
        deadline_s=deadline_s,
    )
    verdicts = moderation.judge(rows, owners, len(texts), moderation.get_labels(model))
    return [verdict.labels for verdict in verdicts]


def _go_on_unchecked(request: CompletionRequest, plan: PlanLimits, error: Exception) -> dict[str, str]:
    """Do what the plan says when nothing can be checked. Raises: AiscaleError (MODERATION_UNAVAILABLE)."""
    SCREENINGS.labels(plan.slug, "unchecked").inc()
    log.error("messages could not be checked: %s", error, extra={"request_id": request.request_id})
    if plan.moderation == "flag":
        return {HEADER: "unchecked"}
    raise AiscaleError(
        Code.MODERATION_UNAVAILABLE,
        "Messages are checked before a model is asked, and the check is not available right now. Try again in a few seconds.",
        retry_after_s=REST_S,
    ) from error


async def _note(request: CompletionRequest, caller: Caller, action: str, labels: tuple[str, ...]) -> None:
    """Write down that something was flagged: who, when and for what, never the text. A failure is logged and stops nothing."""
    flag = ModerationFlag(
        organization_id=caller.organization_id,
        user_id=caller.user_id or "",
        key_id=caller.key_id or "",
        request_id=request.request_id,
        source=request.source,
        model=request.model,
        action=action,
        labels=list(labels),
    )
    try:
        await on_thread(flag.save)
    except Exception:
        log.exception("a flag could not be written down", extra={"request_id": request.request_id})


def _mark(model: CatalogModel, text: str) -> bytes:
    name = f"{model.slug} {model.version}\n".encode()
    return hashlib.sha256(name + text.encode("utf-8", "surrogatepass")).digest()


def _list_words(labels: tuple[str, ...]) -> str:
    words = [label.replace("_", " ") for label in labels]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
