"""Read and type the environment once. Every setting that aiscale takes from outside is declared here, and nowhere else.

A variable ``NAME`` may be given as ``NAME_FILE``, the path of a file that holds it (as container secrets are). A value that
does not parse ends the process with one line that names the variable, what it holds and what it should hold.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

ROOT_DIR = Path(__file__).resolve().parent.parent


class BadSetting(SystemExit):
    """End the process with one clear line about one variable."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"aiscale: the setting {name} {problem}")


def read_text(environ: Mapping[str, str], name: str, default: str = "") -> str:
    """Read a variable or the file that ``NAME_FILE`` names. I/O: one small file, only for ``_FILE``."""
    if value := environ.get(name):
        return value
    if path := environ.get(f"{name}_FILE"):
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise BadSetting(f"{name}_FILE", f"names {path!r}, which cannot be read: {error.strerror}") from error
    return default


def read_int(environ: Mapping[str, str], name: str, default: int, *, low: int, high: int) -> int:
    text = read_text(environ, name)
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        raise BadSetting(name, f"is {text!r}; it must be a whole number from {low} to {high}") from None
    if not low <= value <= high:
        raise BadSetting(name, f"is {value}; it must be from {low} to {high}")
    return value


def read_bool(environ: Mapping[str, str], name: str, default: bool) -> bool:
    text = read_text(environ, name).lower()
    if not text:
        return default
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise BadSetting(name, f"is {text!r}; it must be 1 or 0")


def read_list(environ: Mapping[str, str], name: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
    text = read_text(environ, name)
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else default


def read_networks(environ: Mapping[str, str], name: str) -> tuple[IPv4Network | IPv6Network, ...]:
    found = []
    for text in read_list(environ, name):
        try:
            found.append(ip_network(text))
        except ValueError:
            raise BadSetting(name, f"names {text!r}; it must be addresses or networks such as 10.0.0.0/8") from None
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Env:
    """All of aiscale's settings, typed. Sizes, times and money carry their unit in the name."""

    host: str
    port: int
    data_dir: Path
    models_dir: Path
    database_url: str
    """Empty: the embedded Postgres below ``data_dir`` is used (`manage.py up` starts it)."""
    redis_url: str
    """Empty: the embedded Valkey below ``data_dir`` is used."""
    secret_key: str
    """Empty: `manage.py up` makes one and keeps it in ``data_dir/secret_key``."""
    debug: bool
    allowed_hosts: tuple[str, ...]
    public_url: str
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...]
    """The proxies whose X-Forwarded-For is believed; empty: nobody's is."""
    email_url: str
    email_from: str
    web_workers: int
    execution_providers: str
    engine_slots: int
    engine_threads: int
    kv_memory_mb: int
    """The most memory for keys and values; 0: a quarter of the machine's."""
    encoder_batch: int
    """The most texts of one encoder run."""
    encoder_batch_tokens: int
    """The most tokens of one encoder run, padding counted."""
    encoder_wait_ms: int
    prefill_stall_ms: int
    """How long an encoder that is not idle may wait for more texts to share a run."""
    engine_runner: str
    """``onnx``, or ``fake``: a deterministic runner without a model, for tests of everything around it."""
    fake_step_ms: int
    """How long the fake runner takes for a step."""
    worker_models: tuple[str, ...]
    """The models that this worker serves; empty: all below ``models_dir``."""
    context_tokens: int
    """The longest sequence the engine keeps; a model's own limit may be lower."""
    worker_concurrency: int
    """Tickets that a worker works on at once: each running generation takes one, each encoder two."""
    busy_ms: int
    """How soon a web process should finish what it takes: of more, it refuses what comes as OVERLOADED. 0: it takes everything."""
    queue_limit: int
    """The most jobs that may wait for one model before the gate answers QUEUE_FULL."""
    unserved_s: int
    """How long a model may be without a worker before the gate refuses requests for it; 0: it never does."""
    request_deadline_s: int
    upstreams_private: bool
    """Whether upstreams may have private addresses, such as another server of one's own network."""
    metrics_token: str
    """Who brings it may read ``/metrics``; staff may always."""
    cors_origins: tuple[str, ...]
    """Origins whose pages may call the API; ``*`` for all, none by default."""
    body_limit_bytes: int
    message_batch_limit_bytes: int
    """The largest body of a batch of messages, which goes to disk as it comes; each of its requests is bound as any body is."""
    files_backend: str
    """A Django storage class for callers' files. The default keeps them below ``data_dir``; several machines need a shared one."""
    files_options: str
    """What that class is made with, as a JSON object."""
    file_limit_bytes: int
    """The largest file that may be uploaded."""
    files_quota_bytes: int
    """The most that one organization's files may take together."""
    cache_bytes: int
    """How much of each web process's memory holds cached answers; 0: none."""
    log_level: str
    time_zone: str
    """Where the months and days of budgets begin that name no time zone of their own."""


def load(environ: Mapping[str, str] | None = None) -> Env:
    """Type the environment. I/O: reads ``*_FILE`` secrets. Raises: BadSetting (exits the process with one line)."""
    e = os.environ if environ is None else environ
    data_dir = Path(read_text(e, "AISCALE_DATA_DIR", str(ROOT_DIR / ".data"))).expanduser().resolve()
    host = read_text(e, "HOST", "127.0.0.1")
    port = read_int(e, "PORT", 8000, low=1, high=65535)
    runner = read_text(e, "AISCALE_ENGINE_RUNNER", "onnx")
    if runner not in ("onnx", "fake"):
        raise BadSetting("AISCALE_ENGINE_RUNNER", f"is {runner!r}; it must be onnx or fake")
    log_level = read_text(e, "AISCALE_LOG_LEVEL", "INFO").upper()
    if log_level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise BadSetting("AISCALE_LOG_LEVEL", f"is {log_level!r}; it must be DEBUG, INFO, WARNING or ERROR")
    cores = os.cpu_count() or 1
    slots = read_int(e, "AISCALE_ENGINE_SLOTS", 32, low=1, high=512)
    return Env(
        host=host,
        port=port,
        data_dir=data_dir,
        models_dir=Path(read_text(e, "AISCALE_MODELS_DIR", str(data_dir / "models"))).expanduser().resolve(),
        database_url=_check_url(e, "DATABASE_URL", ("postgres://", "postgresql://")),
        redis_url=_check_url(e, "REDIS_URL", ("redis://", "rediss://", "unix://")),
        secret_key=read_text(e, "SECRET_KEY"),
        debug=read_bool(e, "AISCALE_DEBUG", False),
        allowed_hosts=read_list(e, "AISCALE_ALLOWED_HOSTS"),
        public_url=read_text(e, "AISCALE_PUBLIC_URL", f"http://{_connectable(host)}:{port}").rstrip("/"),
        trusted_proxies=read_networks(e, "AISCALE_TRUSTED_PROXIES"),
        email_url=_check_url(e, "EMAIL_URL", ("smtp://", "smtps://", "file://", "console://")),
        email_from=read_text(e, "AISCALE_EMAIL_FROM", "aiscale@localhost"),
        web_workers=read_int(e, "WEB_WORKERS", max(1, cores // 2), low=1, high=256),
        execution_providers=read_text(e, "AISCALE_EXECUTION_PROVIDERS"),
        engine_slots=slots,
        kv_memory_mb=read_int(e, "AISCALE_KV_MEMORY_MB", 0, low=0, high=1 << 30),
        engine_threads=read_int(e, "AISCALE_ENGINE_THREADS", 0, low=0, high=512),
        encoder_batch=read_int(e, "AISCALE_ENCODER_BATCH", 32, low=1, high=1024),
        encoder_batch_tokens=read_int(e, "AISCALE_ENCODER_BATCH_TOKENS", 1024, low=1, high=1_048_576),
        encoder_wait_ms=read_int(e, "AISCALE_ENCODER_WAIT_MS", 2, low=0, high=1000),
        prefill_stall_ms=read_int(e, "AISCALE_PREFILL_STALL_MS", 100, low=1, high=60_000),
        engine_runner=runner,
        fake_step_ms=read_int(e, "AISCALE_FAKE_STEP_MS", 5, low=0, high=10_000),
        worker_models=read_list(e, "AISCALE_WORKER_MODELS"),
        context_tokens=read_int(e, "AISCALE_CONTEXT_TOKENS", 4096, low=128, high=1_048_576),
        worker_concurrency=read_int(e, "AISCALE_WORKER_CONCURRENCY", max(64, slots + 16), low=1, high=1024),
        busy_ms=read_int(e, "AISCALE_BUSY_MS", 150, low=0, high=60_000),
        queue_limit=read_int(e, "AISCALE_QUEUE_LIMIT", 256, low=1, high=1_000_000),
        unserved_s=read_int(e, "AISCALE_UNSERVED_S", 30, low=0, high=86_400),
        request_deadline_s=read_int(e, "AISCALE_REQUEST_DEADLINE_S", 300, low=5, high=3600),
        upstreams_private=read_bool(e, "AISCALE_UPSTREAMS_PRIVATE", False),
        metrics_token=read_text(e, "AISCALE_METRICS_TOKEN"),
        cors_origins=_check_origins(e, "AISCALE_CORS_ORIGINS"),
        files_backend=read_text(e, "AISCALE_FILES_BACKEND", "django.core.files.storage.FileSystemStorage"),
        files_options=_check_object(e, "AISCALE_FILES_OPTIONS"),
        file_limit_bytes=read_int(e, "AISCALE_FILE_LIMIT_BYTES", 100 << 20, low=1024, high=8 << 30),
        files_quota_bytes=read_int(e, "AISCALE_FILES_QUOTA_BYTES", 2 << 30, low=1024, high=1 << 50),
        cache_bytes=read_int(e, "AISCALE_CACHE_BYTES", 64 << 20, low=0, high=64 << 30),
        body_limit_bytes=read_int(e, "AISCALE_BODY_LIMIT_BYTES", 4 << 20, low=1024, high=256 << 20),
        message_batch_limit_bytes=read_int(e, "AISCALE_MESSAGE_BATCH_LIMIT_BYTES", 256 << 20, low=1024, high=8 << 30),
        log_level=log_level,
        time_zone=_read_time_zone(e),
    )


def _read_time_zone(environ: Mapping[str, str]) -> str:
    name = read_text(environ, "AISCALE_TIME_ZONE", "UTC")
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise BadSetting("AISCALE_TIME_ZONE", f"is {name!r}; it must be a name such as Europe/Berlin or UTC") from None
    return name


def _check_url(environ: Mapping[str, str], name: str, schemes: tuple[str, ...]) -> str:
    value = read_text(environ, name)
    if value and not value.startswith(schemes):
        # The value may hold a password: it is never repeated.
        raise BadSetting(name, f"must start with {' or '.join(schemes)}")
    return value


def _check_origins(environ: Mapping[str, str], name: str) -> tuple[str, ...]:
    origins = read_list(environ, name)
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s*]+", origin):
            raise BadSetting(name, f"names {origin!r}; an origin is like https://app.example.com, without a path, or *")
    return origins


def _check_object(environ: Mapping[str, str], name: str) -> str:
    value = read_text(environ, name, "{}")
    try:
        if isinstance(json.loads(value), dict):
            return value
    except ValueError:
        pass
    # the value may hold a password: it is never repeated
    raise BadSetting(name, "must be a JSON object")


def _connectable(host: str) -> str:
    """Turn a listening address into one that a client can open."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
