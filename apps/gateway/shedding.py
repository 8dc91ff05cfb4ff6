"""Refuse a request that is one too many for this process: at once, before anything of it is read and before anybody is asked."""

from typing import Any

import msgspec
from django.conf import settings

from aiscale.db import make_public_id
from aiscale.errors import AiscaleError, Code
from aiscale.observability import REFUSALS
from apps.gateway.cors import make_headers
from apps.gateway.dialects import ANTHROPIC, OPENAI, Dialect, choose_dialect
from apps.gateway.exchange import Scope, Send

RETRY_AFTER_S = 1
OVERLOADED = AiscaleError(
    Code.OVERLOADED,
    "This server has more requests than it can answer right now. Nothing was charged. Wait a second and send the request again; when it "
    "happens often, send fewer at once.",
    retry_after_s=RETRY_AFTER_S,
)

_refused = REFUSALS.labels(Code.OVERLOADED.value)


class _Wording:
    """Hold the answer in one dialect, made once: only the request's id is not known yet."""

    def __init__(self, dialect: Dialect) -> None:
        mark = "\0"
        self.status = dialect.status_of(OVERLOADED)
        self.id_names = [b"x-request-id", *(name.encode() for name in dialect.common_headers(mark))]
        self._body = msgspec.json.encode(dialect.word(OVERLOADED, mark)).split(msgspec.json.encode(mark)[1:-1])
        size = len(self.write("req_" + "0" * 26))
        fixed = {"content-type": "application/json", "cache-control": "no-store", "x-content-type-options": "nosniff"}
        fixed |= {"content-length": str(size), **dialect.headers_of(OVERLOADED)}
        self.headers = [(name.encode(), value.encode()) for name, value in fixed.items()]

    def write(self, request_id: str) -> bytes:
        """Return the body."""
        return request_id.encode().join(self._body)


_wordings = {dialect: _Wording(dialect) for dialect in (OPENAI, ANTHROPIC)}


def is_ours(path: str) -> bool:
    """Tell whether a path is the API's, whose requests are refused when they are too many. People are few: pages come first."""
    return path == "/v1" or path.startswith("/v1/")


def write_refusal(scope: Scope) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the two ASGI messages that answer OVERLOADED, and count it. I/O: none; some microseconds of CPU. Any thread may ask.

    It is counted (`aiscale_refusals`), and not noted one by one like other refusals: nobody knows the caller yet.
    """
    _refused.inc()
    asked = dict(scope["headers"])
    request_id = make_public_id("req")
    wording = _wordings[choose_dialect(scope["path"], has_anthropic_version=b"anthropic-version" in asked)]
    headers = [*wording.headers, *((name, request_id.encode()) for name in wording.id_names)]
    if b"origin" in asked:
        more = make_headers(settings.ENV.cors_origins, asked[b"origin"].decode("latin-1"))
        headers += [(name.encode(), value.encode("latin-1")) for name, value in more.items()]
    body = b"" if scope["method"] == "HEAD" else wording.write(request_id)
    return {"type": "http.response.start", "status": wording.status, "headers": headers}, {
        "type": "http.response.body",
        "body": body,
    }


async def refuse(scope: Scope, send: Send) -> None:
    """Answer OVERLOADED."""
    for message in write_refusal(scope):
        await send(message)
