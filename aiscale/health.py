"""Say whether this process lives, whether the whole service can answer, and what it measured."""

import asyncio
import hmac
import time
from collections.abc import Callable

from django.conf import settings
from django.db import Error as DatabaseError
from django.db import connection
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.cache import never_cache

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError
from aiscale.wire import keys, metrics

CHECK_TIMEOUT_S = 4.0
CLOCKS_APART_S = 2.0
"""How far this machine's clock may be from Redis's machine's. Holds, windows and leases go by the clock of whoever asks."""


@never_cache
async def healthz(request: HttpRequest) -> HttpResponse:
    """Answer 200: this process takes requests. I/O: none."""
    return HttpResponse("ok\n", content_type="text/plain")


@never_cache
async def readyz(request: HttpRequest) -> HttpResponse:
    """Answer 200 when everything that a request needs is there, else 503, and name what is not.

    I/O: one SQL statement and a few Redis trips, each on its own thread.
    """
    checks = {"postgres": _check_postgres, "redis": _check_redis, "worker": _check_worker, "models": _check_models}
    checks["settlement"] = _check_settlement
    answers = await asyncio.gather(*(_answer(check) for check in checks.values()))
    found = dict(zip(checks, answers, strict=True))
    ready = all(answer == "ok" for answer in answers)
    return JsonResponse({"ready": ready, "checks": found}, status=200 if ready else 503)


@never_cache
async def show_metrics(request: HttpRequest) -> HttpResponse:
    """Answer with the metrics of all processes: to who brings AISCALE_METRICS_TOKEN, and to staff.

    I/O: two Redis trips, one SQL statement for who is logged in.
    """
    wanted, brought = settings.ENV.metrics_token, request.headers.get("authorization", "")
    has_token = bool(wanted) and hmac.compare_digest(brought.encode(), f"Bearer {wanted}".encode())
    if not has_token and not (await request.auser()).is_staff:
        why = "Bring AISCALE_METRICS_TOKEN as a bearer token, or log in as staff.\n"
        return HttpResponse(why, status=403, content_type="text/plain")
    try:
        text = await asyncio.to_thread(lambda: metrics.collect(redis_clients.get_sync()))
    except redis_clients.UNAVAILABLE:
        return HttpResponse("Redis does not answer\n", status=503, content_type="text/plain")
    return HttpResponse(text, content_type="text/plain; version=0.0.4; charset=utf-8")


async def _answer(check: Callable[[], str]) -> str:
    def run() -> str:
        try:
            return check()
        except redis_clients.UNAVAILABLE:
            return "Redis does not answer"
        except DatabaseError:
            return "Postgres does not answer"
        except AiscaleError as error:
            return error.message
        finally:
            connection.close()

    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            return await asyncio.to_thread(run)
    except TimeoutError:
        return f"no answer within {CHECK_TIMEOUT_S:g} s"


def _check_postgres() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    return "ok"


def _check_redis() -> str:
    client = redis_clients.get_sync()
    asked_s = time.time()
    seconds, microseconds = client.time()
    answered_s, theirs_s = time.time(), seconds + microseconds / 1_000_000
    apart_s = max(asked_s - theirs_s, theirs_s - answered_s)
    if apart_s > CLOCKS_APART_S:
        side = "ahead of" if asked_s > theirs_s else "behind"
        return f"this machine's clock is {apart_s:.0f} s {side} that of Redis's machine; set both by NTP"
    return "ok"


def _check_worker() -> str:
    from apps.inference import presence

    return "ok" if presence.list_workers() else "no inference worker is there"


def _check_models() -> str:
    from apps.inference import presence
    from apps.inference.models import Model

    served = presence.read_served()
    enabled = dict(Model.objects.filter(is_enabled=True, upstream=None).values_list("slug", "version"))
    missing = sorted(
        slug for slug, version in enabled.items() if not any(version in each for each in served.get(slug, ()))
    )
    if not enabled:
        return "the catalog is empty"
    return f"no worker serves {', '.join(missing)}" if missing else "ok"


def _check_settlement() -> str:
    client = redis_clients.get_sync()
    if not client.exists(keys.SETTLEMENT_PRESENCE):
        return "settlement does not run"
    return "ok" if client.exists(keys.EPOCH) else "the gate opens in a few seconds: Redis is new, or was emptied"
