"""Let pages of other origins call the API, where the owner allows it (AISCALE_CORS_ORIGINS). Off unless they are named.

Cookies play no part: the API knows callers by their key alone.
"""

from collections.abc import Sequence

METHODS = "GET, POST, DELETE, OPTIONS"
MAX_AGE_S = 600
EXPOSED = (
    "x-request-id, request-id, retry-after, x-should-retry, x-aiscale-cache, x-aiscale-cache-similarity, x-aiscale-moderation, "
    "idempotent-replayed, openai-processing-ms, content-disposition, content-range, "
    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    "x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)


def make_headers(origins: Sequence[str], origin: str | None) -> dict[str, str]:
    """Return the headers that let a page of ``origin`` read an answer; none when it may not."""
    if origin is None or not origins:
        return {}
    if "*" in origins:
        return {"access-control-allow-origin": "*", "access-control-expose-headers": EXPOSED}
    if origin not in origins:
        return {"vary": "origin"}
    return {"access-control-allow-origin": origin, "access-control-expose-headers": EXPOSED, "vary": "origin"}


def make_preflight_headers(origins: Sequence[str], origin: str | None, wanted: str | None) -> dict[str, str] | None:
    """Return the headers of an answer to a browser's question before the request; None when it may not."""
    headers = make_headers(origins, origin)
    if "access-control-allow-origin" not in headers:
        return None
    headers.pop("access-control-expose-headers")
    return headers | {
        "access-control-allow-methods": METHODS,
        # any header may be sent: none of them carries rights but the key
        "access-control-allow-headers": wanted or "authorization, content-type",
        "access-control-max-age": str(MAX_AGE_S),
    }
