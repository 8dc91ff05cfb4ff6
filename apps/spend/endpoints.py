"""Let an organization's owners and admins say which of their servers are told of its alerts. `webhooks` sends; `alerts` says what."""

from datetime import timedelta
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.db import transaction
from django.db.models import CharField, F, QuerySet, Value
from django.db.models.functions import Cast, Concat
from django.utils import timezone

from aiscale import sealing
from aiscale.errors import AiscaleError, Code
from apps.accounts import audit, organizations
from apps.accounts.models import Organization, User
from apps.accounts.roles import Right
from apps.spend import webhooks
from apps.spend.alert_models import AlertDelivery, WebhookEndpoint

MAX_ENDPOINTS, MAX_CHARS = 10, 500
OVERLAP = timedelta(hours=24)
"""How long the old secret signs too after it was changed."""
RECENT = 20


def list_endpoints(organization: Organization) -> list[WebhookEndpoint]:
    """I/O: one SQL statement."""
    return list(organization.webhook_endpoints.order_by("created_at", "id"))


def list_recent(organization: Organization) -> list[AlertDelivery]:
    """List the last messages to its endpoints, the newest first. I/O: one SQL statement."""
    return list(list_deliveries(organization).order_by("-created_at", "-id")[:RECENT])


def list_deliveries(organization: Organization) -> QuerySet[Any]:
    """Return all messages to its endpoints. Each has as ``public_id`` what the receiver read as ``webhook-id``. I/O: none yet."""
    owed = AlertDelivery.objects.filter(endpoint__organization=organization).select_related("alert", "endpoint")
    name = Concat(Value("msg_"), Cast("alert_id", CharField()), Value("_"), F("endpoint__public_id"))
    return owed.annotate(public_id=name)


def add(by: User, organization: Organization, url: str, *, actor: audit.Actor) -> tuple[WebhookEndpoint, str]:
    """Add an endpoint; return it with its secret: show it once.

    I/O: SQL. Raises: AiscaleError (INVALID_REQUEST, NOT_FOUND, PERMISSION_DENIED, TOO_MANY_OBJECTS).
    """
    url = check_url(url)
    with transaction.atomic():
        place = organizations.lock_for(by, organization, Right.MANAGE_WEBHOOKS)
        own = place.organization.webhook_endpoints
        if own.filter(url=url).exists():
            raise AiscaleError(Code.INVALID_REQUEST, "This URL is told already.", param="url")
        if own.count() >= MAX_ENDPOINTS:
            raise AiscaleError(
                Code.TOO_MANY_OBJECTS,
                f"{MAX_ENDPOINTS} URLs are told already, the most there can be. Delete one first.",
            )
        endpoint, secret = webhooks.make_endpoint(url, place.organization)
        _record("webhook.create", endpoint, actor)
    return endpoint, secret


def rotate(
    by: User, organization: Organization, endpoint_id: str, *, actor: audit.Actor
) -> tuple[WebhookEndpoint, str]:
    """Give an endpoint another secret; the old one signs too for `OVERLAP`. Returns the new one: show it once.

    I/O: SQL. Raises: AiscaleError (NOT_FOUND, PERMISSION_DENIED).
    """
    with transaction.atomic():
        endpoint = _lock(by, organization, endpoint_id)
        secret = webhooks.make_secret()
        endpoint.sealed_old_secret, endpoint.old_secret_until = endpoint.sealed_secret, timezone.now() + OVERLAP
        endpoint.sealed_secret = sealing.seal(secret)
        endpoint.save(update_fields=["sealed_secret", "sealed_old_secret", "old_secret_until", "updated_at"])
        _record("webhook.rotate", endpoint, actor)
    return endpoint, secret


def set_active(
    by: User, organization: Organization, endpoint_id: str, is_active: bool, *, actor: audit.Actor
) -> WebhookEndpoint:
    """Pause an endpoint, or go on with it. While it pauses nothing is sent to it; what was owed before waits, and what happens is not told.

    I/O: SQL. Idempotent. Raises: AiscaleError (NOT_FOUND, PERMISSION_DENIED).
    """
    with transaction.atomic():
        endpoint = _lock(by, organization, endpoint_id)
        _check_not_blocked(endpoint)
        if endpoint.is_active != is_active:
            endpoint.is_active = is_active
            endpoint.save(update_fields=["is_active", "updated_at"])
            _record("webhook.resume" if is_active else "webhook.pause", endpoint, actor)
    return endpoint


def resend(by: User, organization: Organization, message_id: str, *, actor: audit.Actor) -> AlertDelivery:
    """Have a message sent once more, within seconds, under the same id; it is then tried for a day again.

    I/O: SQL. Raises: AiscaleError (NOT_FOUND, PERMISSION_DENIED, INVALID_REQUEST).
    """
    with transaction.atomic():
        place = organizations.lock_for(by, organization, Right.MANAGE_WEBHOOKS)
        own = list_deliveries(place.organization).filter(public_id=message_id.replace("\x00", ""))
        delivery: AlertDelivery | None = own.select_for_update(of=("self",)).first()
        if delivery is None or delivery.endpoint is None:
            raise AiscaleError(Code.NOT_FOUND, "This message does not exist.", param="delivery_id")
        _check_not_blocked(delivery.endpoint)
        if not delivery.endpoint.is_active:
            raise AiscaleError(Code.INVALID_REQUEST, "This webhook is paused. Resume it first.", param="delivery_id")
        delivery.attempts, delivery.error = 0, ""
        delivery.due_at, delivery.delivered_at = timezone.now(), None
        delivery.save(update_fields=["attempts", "error", "due_at", "delivered_at"])
        _record("webhook.resend", delivery.endpoint, actor, message=message_id)
    return delivery


def delete(by: User, organization: Organization, endpoint_id: str, *, actor: audit.Actor) -> WebhookEndpoint:
    """Tell it nothing any more; what was owed to it is forgotten. I/O: SQL. Raises: AiscaleError (NOT_FOUND, PERMISSION_DENIED)."""
    with transaction.atomic():
        endpoint = _lock(by, organization, endpoint_id)
        _check_not_blocked(endpoint)
        _record("webhook.delete", endpoint, actor)
        WebhookEndpoint.objects.filter(pk=endpoint.pk).delete()
    return endpoint


def send_test(organization: Organization, endpoint_id: str) -> tuple[WebhookEndpoint, str]:
    """Send a test message now. Returns the endpoint and why it did not arrive, '' when it did.

    I/O: SQL, HTTP of at most ten seconds. Raises: AiscaleError (NOT_FOUND, PERMISSION_DENIED).
    """
    endpoint = find(organization, endpoint_id)
    _check_not_blocked(endpoint)
    return endpoint, webhooks.send_test(endpoint)


def _check_not_blocked(endpoint: WebhookEndpoint) -> None:
    """Raise: AiscaleError (PERMISSION_DENIED) for what an administrator of the service has stopped."""
    if endpoint.is_blocked:
        message = "This webhook is blocked by the administrators of this service. Ask them, or add another address."
        raise AiscaleError(Code.PERMISSION_DENIED, message, param="webhook_id")


def find(organization: Organization, endpoint_id: str) -> WebhookEndpoint:
    """Return one of the organization's endpoints. I/O: one SQL statement. Raises: AiscaleError (NOT_FOUND)."""
    found = organization.webhook_endpoints.filter(public_id=endpoint_id.replace("\x00", "")).first()
    if found is None:
        raise AiscaleError(Code.NOT_FOUND, "This webhook does not exist.", param="endpoint_id")
    return found


def check_url(url: str) -> str:
    """Return the URL of a public server. Raises: AiscaleError (INVALID_REQUEST)."""
    url = url.strip()
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise _refuse("This is no web address. Write one such as https://example.com/hooks.") from None
    if not host or not url.isprintable() or " " in url or len(url) > MAX_CHARS or parts.scheme not in ("http", "https"):
        raise _refuse("This is no web address. Write one such as https://example.com/hooks.")
    if parts.username or parts.password:
        raise _refuse("Leave name and password out of the address. Each message is signed: check that instead.")
    if settings.ENV.upstreams_private:
        return url
    if parts.scheme != "https":
        raise _refuse("Messages tell what you spend: the address has to begin with https://.")
    if host == "localhost" or _is_private(host):
        raise _refuse("This address is private: it cannot be reached from here. Write a public one.")
    return url


def _is_private(host: str) -> bool:
    """Names are looked up when something is sent; an address tells at once."""
    try:
        return not ip_address(host.partition("%")[0]).is_global
    except ValueError:
        return False


def _lock(by: User, organization: Organization, endpoint_id: str) -> WebhookEndpoint:
    place = organizations.lock_for(by, organization, Right.MANAGE_WEBHOOKS)
    return find(place.organization, endpoint_id)


def _record(action: str, endpoint: WebhookEndpoint, by: audit.Actor, **details: str) -> None:
    assert endpoint.organization is not None
    audit.record(
        action,
        target=f"webhook:{endpoint.public_id}",
        by=by,
        organization_id=endpoint.organization.public_id,
        details={"url": endpoint.url, **details},
    )


def _refuse(message: str) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, message, param="url")
