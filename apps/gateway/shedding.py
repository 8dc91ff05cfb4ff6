"""Refuse a request that is one too many for this process: at once, before anything of it is read and before anybody is asked."""

import msgspec
from django.conf import settings

from aiscale.db import make_public_id
from aiscale.errors import AiscaleError, Code
from aiscale.observability import REFUSALS
from apps.gateway.cors import make_headers
from apps.gateway.dialects import OPENAI, choose_dialect
from apps.gateway.exchange import Scope, Send

RETRY_AFTER_S = 1
OVERLOADED = AiscaleError(
    Code.OVERLOADED,
    "This server has more requests than it can answer right now. Nothing was charged. Wait a second and send the request again; when it "
    "happens often, send fewer at once.",
    retry_after_s=RETRY_AFTER_S,
)

_refused = REFUSALS.labels(Code.OVERLOADED.value)
_openai_body = msgspec.json.encode(OPENAI.word(OVERLOADED, ""))
_fixed = {"content-type": "application/json", "cache-control": "no-store", "x-content-type-options": "nosniff"}


async def refuse(scope: Scope, send: Send) -> None:
    """Answer OVERLOADED. I/O: none but the answer; some ten microseconds of CPU.

    It is counted (`aiscale_refusals`), and not noted one by one like other refusals: nobody knows the caller yet.
    """
    _refused.inc()
    headers = dict(scope["headers"])
    request_id = make_public_id("req")
    dialect = choose_dialect(scope["path"], has_anthropic_version=b"anthropic-version" in headers)
    body = _openai_body if dialect is OPENAI else msgspec.json.encode(dialect.word(OVERLOADED, request_id))
    pairs = _fixed | {"content-length": str(len(body)), "x-request-id": request_id}
    pairs |= dialect.headers_of(OVERLOADED) | dict(dialect.common_headers(request_id))
    if b"origin" in headers:
        pairs |= make_headers(settings.ENV.cors_origins, headers[b"origin"].decode("latin-1"))
    start = [(name.encode(), value.encode("latin-1")) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": dialect.status_of(OVERLOADED), "headers": start})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
