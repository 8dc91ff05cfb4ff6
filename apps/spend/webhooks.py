"""Send signed messages to other people's servers, in the form of Standard Webhooks (standardwebhooks.com).

``webhook-id`` stays the same over all tries, so that a receiver can tell a repetition; ``webhook-signature`` is ``v1,`` and the base64 of
HMAC-SHA256 over ``<id>.<timestamp>.<body>`` with the endpoint's secret; after that was changed, for a day also with the old one. An
organization's endpoint may not have a private address, unless AISCALE_UPSTREAMS_PRIVATE allows it: what is checked is what is connected
to, and redirects are not followed.
"""

import base64
import hashlib
import hmac
import ipaddress
import secrets
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
from django.conf import settings
from django.utils import timezone

from aiscale import sealing
from apps.accounts.models import Organization
from apps.spend.alert_models import WebhookEndpoint

SECRET_PREFIX = "whsec_"  # noqa: S105 - says what it is
TIMEOUT_S = 10.0
DELIVERED = "delivered"


class NotDelivered(Exception):
    """Say in a few words why a message did not arrive. It holds no address and no secret."""


def make_endpoint(url: str, organization: Organization | None = None) -> tuple[WebhookEndpoint, str]:
    """Add an endpoint; return it with its secret, which is nowhere else in plain text: show it once. I/O: SQL."""
    secret = make_secret()
    endpoint = WebhookEndpoint.objects.create(url=url, organization=organization, sealed_secret=sealing.seal(secret))
    return endpoint, secret


def name_message(alert_id: int, endpoint: WebhookEndpoint) -> str:
    """Return the ``webhook-id`` of what tells this endpoint of this alert: the same over all tries."""
    return f"msg_{alert_id}_{endpoint.public_id}"


def make_secret() -> str:
    """Return a new signing secret of 192 random bits."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(24)).decode()


def sign(secret: str, message_id: str, timestamp_s: int, body: bytes) -> str:
    """Return the value of ``webhook-signature``."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    digest = hmac.new(key, f"{message_id}.{timestamp_s}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def send_test(endpoint: WebhookEndpoint) -> str:
    """Send a message that says nothing. Returns why it did not arrive, '' when it did. I/O: one SQL statement, as `send`."""
    now, error = timezone.now(), ""
    try:
        send(endpoint, f"msg_test_{now:%Y%m%d%H%M%S%f}", {"type": "test", "timestamp": now.isoformat(), "data": {}})
    except NotDelivered as refusal:
        error = str(refusal)[:200]
    WebhookEndpoint.objects.filter(pk=endpoint.pk).update(last_result=error or DELIVERED, last_tried_at=now)
    return error


def send(endpoint: WebhookEndpoint, message_id: str, value: dict[str, Any]) -> None:
    """Send one message. I/O: a look-up of the name, HTTP of at most ten seconds. Raises: NotDelivered."""
    held = _list_secrets(endpoint)
    parts = urlsplit(endpoint.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise NotDelivered("its URL is no http or https address")
    address = _find_address(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80), endpoint)
    body, timestamp_s = msgspec.json.encode(value), int(time.time())
    url = httpx.URL(endpoint.url)
    headers = {
        "host": url.netloc.decode(),
        "content-type": "application/json",
        "user-agent": "aiscale-webhooks",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": " ".join(sign(secret, message_id, timestamp_s, body) for secret in held),
    }
    try:
        with httpx.Client(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False) as client:
            request = client.build_request("POST", url.copy_with(host=address), content=body, headers=headers)
            request.extensions["sni_hostname"] = parts.hostname
            response = client.send(request, stream=True)
            response.close()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise NotDelivered(f"it did not answer ({type(error).__name__})") from error
    if not response.is_success:
        raise NotDelivered(f"it answered {response.status_code}")


def _list_secrets(endpoint: WebhookEndpoint) -> list[str]:
    """Return the secret, and the one before it while that still counts."""
    sealed = [endpoint.sealed_secret]
    if endpoint.old_secret_until is not None and endpoint.old_secret_until > timezone.now():
        sealed.append(endpoint.sealed_old_secret)
    try:
        return [sealing.unseal(each) for each in sealed]
    except sealing.CannotUnseal as error:
        raise NotDelivered("its secret cannot be read: make a new one") from error


def _find_address(host: str, port: int, endpoint: WebhookEndpoint) -> str:
    try:
        found = [str(item[4][0]) for item in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise NotDelivered("its name cannot be found") from error
    # the site's own endpoints are the administrator's, and may well be inside
    is_trusted = endpoint.organization_id is None or settings.ENV.upstreams_private
    if not is_trusted and not all(ipaddress.ip_address(each.partition("%")[0]).is_global for each in found):
        raise NotDelivered("its address is private")
    return found[0]
