"""Name every Redis key, stream and channel, with its type, its life and its only writer.

All live below ``aiscale:``. Nothing here does I/O.
"""

PREFIX = "aiscale:"

# --- job protocol: written only through the scripts of aiscale/wire/lua ----------------------------------------------------

LEASES = PREFIX + "leases"
"""Sorted set: job id -> epoch ms at which nobody answers for it any more. Queued: the job's deadline. Running: pushed ahead by
the worker's heartbeat. The reaper looks at what has passed."""

LEASE_MS = 6_000
HEARTBEAT_MS = 1_000
MAX_ATTEMPTS = 3

FINISHED = PREFIX + "finished"
"""Stream, one `Finished` an entry (field ``0``; ``p`` and ``r`` when a web process must have taken it, see finish.lua). Consumer
groups: ``settlement`` (spend), ``transcripts`` (chat). Trimmed by
settlement behind what both have acknowledged; never by length, since it is money."""

FINISHED_DEAD = PREFIX + "finished:dead"
"""Stream: entries of `FINISHED` that settlement cannot charge: ``0`` as it was, ``id`` its place, ``reason``. Written by settlement; kept
until a person has looked."""

GROUP_SETTLEMENT = "settlement"
GROUP_TRANSCRIPTS = "transcripts"

JOB_RECORD_AFTER_S = 600
JOB_LOG_TTL_S = 3_600


def job_record(job_id: str) -> str:
    """Hash: kind, payload (JSON job), model, state (queued|running|done), attempt, worker, streamed (0|1), deadline_ms, cancelled
    (reason), resting (1 while it is held back after a worker was lost);
    seen_prompt_tokens and seen_completion_tokens (what an upstream has made so far);
    its place in the queue: queued_at_ms, seq, tier, organization,
    tokens, weight; in_flight (the sets that count it); beside (jobs that ran when it began, itself included)."""
    return f"{PREFIX}job:{job_id}"


def job_log(job_id: str) -> str:
    """Stream: the events of a job with ``keep_log``, fields ``0``, ``1``...; for browsers that come back. Lives `JOB_LOG_TTL_S`."""
    return f"{PREFIX}joblog:{job_id}"


def job_result(job_id: str) -> str:
    """String: vectors too large for an event. Lives two minutes. Written by the worker."""
    return f"{PREFIX}result:{job_id}"


def replies(process_id: str) -> str:
    """Stream: events for one web process, fields ``0``, ``1``... an entry. Written by workers and the reaper, capped at about
    `REPLIES_MAXLEN` entries; lives `REPLIES_TTL_S` past the reader's last refresh."""
    return f"{PREFIX}replies:{process_id}"


def reader_presence(process_id: str) -> str:
    """String: 1. Written by a web process while it reads its replies, each `READER_BEAT_S`; lives `READER_PRESENCE_TTL_S`. Workers cancel
    what they do for a process that is gone, unless the job keeps a log (S2)."""
    return f"{PREFIX}reader:{process_id}"


READER_BEAT_S = 1.0
READER_PRESENCE_TTL_S = 12


def web_progress(process_id: str) -> str:
    """String: the last entry of `replies` that the process took, written before what is in it is handed on. Lives a day."""
    return f"{PREFIX}webread:{process_id}"


WEB_PROGRESS_TTL_S = 86_400

REMEMBER_ENDS_S = 30.0
REMEMBER_ENDS = 20_000
"""How long, and how many, a process remembers of what ended, for a Redis that forgets it."""

REPLIES_MAXLEN = 50_000
REPLIES_TTL_S = 120

# --- control -----------------------------------------------------------------------------------------------------------------

CONTROL_CHANNEL = PREFIX + "control"
"""Pub/sub: encoded `Control`. Anyone may order; what must not be missed is also in a key (KILLED, the job's record)."""

CHAT_NEWS = PREFIX + "chat:news"
"""Pub/sub: encoded `apps.chat.news.News`: what happened in one of a person's pages, for their others. What is missed is asked for."""

KILLED = PREFIX + "killed"
"""Hash: scope -> order (see ``aiscale.wire.scopes``). Written by spend.killswitch alone; no TTL. The field
`KILLED_LOADED` is always in it: without it the gate knows that the hash was lost, and lets nobody pass before it is rebuilt."""

KILLED_LOADED = "loaded"


def breaker(provider: str) -> str:
    """Hash: failures (in a row), open_until_ms, probe_until_ms, of one upstream; missing while all is well. Written by
    inference.breaker alone; lives an hour past the last failure."""
    return f"{PREFIX}breaker:{provider}"


def worker_presence(worker_id: str) -> str:
    """String: JSON {worker_id, models: {slug: main version}, versions: {slug: [version]}, providers, running, waiting, started_at_ms}.
    Written by that worker each `HEARTBEAT_MS`, lives 5 s."""
    return f"{PREFIX}worker:{worker_id}"


WORKER_PRESENCE_TTL_S = 5
WORKER_PRESENCE_PATTERN = PREFIX + "worker:*"


def model_served(model: str) -> str:
    """String: epoch ms at which a worker that serves the model was heard of last. Written by workers each `HEARTBEAT_MS`, lives a day."""
    return f"{PREFIX}served:{model}"


MODEL_SERVED_TTL_S = 86_400

TRAFFIC = PREFIX + "traffic"
"""Hash: model -> JSON list of the versions that its requests are sent to, the main one first. Workers load them. Written by
inference.traffic alone; no TTL, made anew each ten seconds."""

METRICS = PREFIX + "metrics"
"""Hash: process -> epoch ns (8 bytes) and its metrics as text. Written through wire.metrics alone: by each process its own, each 5 s; who
reads removes those of processes that are gone."""

SETTLEMENT_PRESENCE = PREFIX + "settlement:alive"
"""String: epoch ms. Written by the settlement process every second, lives 5 s."""

EPOCH = PREFIX + "epoch"
"""String: a name that no other has. Written by spend.recovery alone, once all that this Redis lost is settled; no TTL. While it is missing
the gate refuses everything: somebody emptied Redis, or it is new. Web processes and workers that see another one say again what ended
lately."""

RECOVERING = PREFIX + "recovering"
"""String: epoch ms at which settlement noticed that `EPOCH` is missing. Written by spend.recovery; lives a minute."""
# --- cached answers: written by inference.cache alone ---------------------------------------------------------------------------


def cached(key: bytes) -> str:
    """String: an answer, by the 32 bytes that stand for its request. Lives half an hour."""
    return f"{PREFIX}cached:{key.hex()}"


def flight(key: bytes) -> str:
    """String: the name of the flight that computes this answer now; whoever else wants it waits for `cached`. Lives as long as its owner
    keeps touching it, a few seconds past that."""
    return f"{PREFIX}flight:{key.hex()}"


def flight_wanted(name: str) -> str:
    """String: 1. Written each second by other processes that follow the flight; lives five seconds."""
    return f"{PREFIX}flightwanted:{name}"


def flight_log(name: str) -> str:
    """Stream: what a flight told so far, encoded `Delta`s, fields ``0``, ``1``... an entry. Written by the process that flies, once it is
    wanted; lives half a minute past the last word."""
    return f"{PREFIX}flightlog:{name}"


CACHE_GENERATIONS = PREFIX + "cachegenerations"
"""Hash: ``site``, ``model:<slug>``, ``organization:<id>`` -> how often it was purged. Part of every key, so that a purge empties all levels
at once. A loss of Redis is a purge of nothing: the table is the truth (inference.cache.generations)."""

REFUSED = PREFIX + "refused"
"""Stream: requests that were refused, some one by one and all as counts, one ``RefusedBatch`` of spend.refusal_log (field ``0``) an entry.
Written by web processes each half second; capped at about `REFUSED_MAXLEN` entries, since it is comfort and not money. Consumer group:
``refusals`` (spend), which deletes what it has written down."""

REFUSED_MAXLEN = 1_000
GROUP_REFUSALS = "refusals"

# --- identity, as the gate sees it: written by accounts.mirror alone -----------------------------------------------------------


def api_key(digest: str) -> str:
    """Hash by the key's sha256 hex: key_id, organization_id, user_id, state (active|revoked|expired), expires_at_ms ('' = never); the
    key's own limits, '' = none: requests_per_window, window_s, tokens_per_minute, max_in_flight; models (as the plan's)."""
    return f"{PREFIX}key:{digest}"


def organization(organization_id: str) -> str:
    """Hash: plan (slug), state (active|suspended), semantic_max_error_percent ('' = no semantic cache)."""
    return f"{PREFIX}org:{organization_id}"


def plan(slug: str) -> str:
    """Hash: requests_per_window, window_s, max_in_flight, monthly_limit_nanousd, models ('*' or comma-separated slugs); '' = no limit:
    tokens_per_minute, max_queued (jobs waiting for a model), max_wait_s (longest expected wait)."""
    return f"{PREFIX}plan:{slug}"


# --- money and limits: written by spend alone ------------------------------------------------------------------------------------


BUDGETS = PREFIX + "budgets"
"""Hash: scope -> what its budgets say, as one text (apps/spend/budgets.py). Written by spend.balance alone, as a whole; no TTL. The field
`BUDGETS_LOADED` is always in it and changes with every budget: without it the gate knows that the hash was lost, and lets nobody pass
before it is rebuilt."""

BUDGETS_LOADED = "loaded"


def spend(scope: str) -> str:
    """Hash: definition (of the budgets that it was made for), held_nanousd, and for each of ``daily`` and ``monthly`` that has a budget
    start_ms, end_ms, spent_nanousd, revision (of the row in Postgres), limit_nanousd ('' = none, 'plan' = the plan's), raise_nanousd and
    raise_until_ms, each behind ``daily_`` or ``monthly_``. The fast copy; rebuilt from Postgres when it is missing or outdated.

    Scopes: ``site``, ``plan:<slug>``, ``model:<slug>``, ``organization:<id>``, ``user:<id>``, ``key:<id>``.
    """
    return f"{PREFIX}spend:{scope}"


def holds(scope: str) -> str:
    """Sorted set: `hold` -> epoch ms at which it expires. Every running job is in all of its scopes, with or without budgets, so that a
    new budget counts what is running."""
    return f"{PREFIX}holds:{scope}"


def hold(job_id: str, nanousd: int) -> str:
    """Member of `holds`: the job, and how much is held for it."""
    return f"{job_id}:{nanousd}"


def in_flight(scope: str) -> str:
    """Sorted set: job id -> epoch ms at which its hold expires, of an organization or a key: its requests in flight. Placed by the gate; a
    job leaves it in the step in which it ends (``lua/finish.lua``), before it is settled, or when its hold is given back."""
    return f"{PREFIX}inflight:{scope}"


def rate(scope: str) -> str:
    """Hash: index of a sixtieth of the window -> requests in it; ``unit_ms``, that sixtieth's length; ``used``, the sum of all; ``oldest``
    and ``newest`` index. Of an organization or a key; lives one window."""
    return f"{PREFIX}rate:{scope}"


def token_rate(scope: str) -> str:
    """Hash: the same for tokens, in a window of a minute."""
    return f"{PREFIX}tokenrate:{scope}"


# --- the queue: written by the job scripts alone, as queue.lua says ----------------------------------------------------------------

QUEUES = PREFIX + "queues"
"""Hash: model that was ever asked for -> kind (generate|encode)."""


def queue_depth(model: str) -> str:
    """Sorted set: queued job id -> deadline ms, of one model; members leave when a worker claims them."""
    return f"{PREFIX}queued:{model}"


def queue_state(model: str) -> str:
    """Hash: seq, call_after_ms (somebody looks before that), backlog_at_ms (jobs wait since), rate_at_ms (last end), rate_tokens,
    rate_ms and rate_ends (how fast the model works while jobs wait), time:<tier>, tokens:<tier> and tokens:<tier>:<organization>
    (waiting). Also the beginning of the names of the lanes, sorted sets (see ``lua/queue.lua``)."""
    return f"{PREFIX}queue:{model}"


def celery_queue(model: str) -> str:
    """Celery queue of one model. It carries tickets: "there is work for this model"."""
    return f"model.{model}"
