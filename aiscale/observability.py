"""Declare every metric and log field in one place. Plain Python: web and workers share it.

Metrics are Prometheus'; each process says its own, and `/metrics` those of all (`aiscale.wire.metrics`). Logs are one JSON object a line.
"""

import json
import logging
import sys
import time

from prometheus_client import Counter, Gauge, Histogram

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

REFUSALS = Counter("aiscale_refusals", "Requests refused, by reason", ["code"])
ADMISSIONS = Counter("aiscale_admissions", "Requests admitted", ["model", "plan"])
SCREENINGS = Counter("aiscale_screenings", "Prompts checked before a model was asked, by outcome", ["plan", "outcome"])
ADMISSION_SECONDS = Histogram("aiscale_admission_seconds", "Time of the admission gate", buckets=LATENCY_BUCKETS_S)
FIRST_TOKEN_SECONDS = Histogram(
    "aiscale_first_token_seconds",
    "Admission to first token, as the web sees it",
    ["model"],
    buckets=LATENCY_BUCKETS_S,
)
TOKEN_DELIVERY_SECONDS = Histogram(
    "aiscale_token_delivery_seconds",
    "A token's way from the worker's engine to the answer that is being sent, by both machines' clocks",
    ["model"],
    buckets=LATENCY_BUCKETS_S,
)
CANARIES_ROLLED_BACK = Counter("aiscale_canaries_rolled_back", "Versions rolled back by themselves", ["model"])
JOBS_FINISHED = Counter("aiscale_jobs_finished", "Jobs ended, by reason", ["model", "finish_reason"])
TOKENS = Counter("aiscale_tokens", "Tokens settled", ["model", "kind"])
SETTLED = Counter("aiscale_settled", "Usage records written by settlement", ["outcome"])
SETTLEMENT_LAG_SECONDS = Gauge(
    "aiscale_settlement_lag_seconds", "Age of the oldest finished job that is not in the ledger"
)
CACHE_LOOKUPS = Counter("aiscale_cache_lookups", "Answers looked for, by the level where they were", ["model", "level"])
CACHE_SAVED = Counter(
    "aiscale_cache_saved_nanousd",
    "How much less answers cost because they, or parts of them, were known",
    ["organization"],
)
CACHE_BYTES = Gauge("aiscale_cache_bytes", "Bytes of this process's own cache")
ENGINE_RUNNING = Gauge("aiscale_engine_running", "Sequences in the batch", ["model", "version"])
ENGINE_WAITING = Gauge("aiscale_engine_waiting", "Sequences waiting for a slot", ["model", "version"])
ENGINE_STEP_SECONDS = Histogram(
    "aiscale_engine_step_seconds", "Time of one engine step", ["model"], buckets=LATENCY_BUCKETS_S
)
ENGINE_TOKENS = Counter("aiscale_engine_tokens", "Tokens computed by the engine", ["model", "kind"])
ENGINE_BATCH_SIZE = Histogram(
    "aiscale_engine_batch_size",
    "Sequences that one step decodes",
    ["model"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)
ENGINE_FIRST_TOKEN_SECONDS = Histogram(
    "aiscale_engine_first_token_seconds", "Arrival at the engine to first token", ["model"], buckets=LATENCY_BUCKETS_S
)
ENGINE_TOKEN_GAP_SECONDS = Histogram(
    "aiscale_engine_token_gap_seconds", "Time between two tokens of a sequence", ["model"], buckets=LATENCY_BUCKETS_S
)
ENGINE_KV_TOKENS = Gauge(
    "aiscale_engine_kv_tokens",
    "Tokens whose keys and values have their place: of the running, and kept",
    ["model", "version", "use"],
)
ENGINE_GUESSED_TOKENS = Counter(
    "aiscale_engine_guessed_tokens",
    "Tokens that were guessed by prompt look-up and computed ahead (right or wrong)",
    ["model", "result"],
)
ENGINE_PREFIX_TOKENS = Counter(
    "aiscale_engine_prefix_tokens",
    "Prompt tokens of the requests that began (asked), and found kept (reused)",
    ["model", "kind"],
)

ENCODER_BATCH_TEXTS = Histogram(
    "aiscale_encoder_batch_texts", "Texts of one encoder run", ["model"], buckets=(1, 2, 4, 8, 16, 24, 32, 64, 128)
)

LOG_FIELDS = ("request_id", "job_id", "organization_id", "model", "worker_id", "code", "event")
"""What a log call may pass in ``extra``; other extras are dropped, so that no prompt and no secret slips in."""


class JsonFormatter(logging.Formatter):
    """Write a log record as one line of JSON with time, level, logger, message and the declared fields."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update({name: getattr(record, name) for name in LOG_FIELDS if hasattr(record, name)})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure_logging(level: str) -> None:
    """Send the root logger to stderr as JSON lines. Idempotent."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
