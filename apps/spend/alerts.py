"""Tell people and programs that a budget's threshold was passed: once each, by e-mail and by signed webhook.

`SpendAlert` rows are written with the charge that passed them. From each come the messages that are owed (`AlertDelivery`), in one
transaction; each message is sent until it has arrived or a day has passed. A process that dies in between sends a message twice, with the
same id, and never not at all.
"""

import logging
from datetime import timedelta
from smtplib import SMTPException
from typing import Any

from django.conf import settings
from django.core.mail import EmailMessage
from django.db import transaction
from django.db.models import Q
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils import timezone

from aiscale.db import format_usd
from apps.accounts.models import ApiKey, Membership, Organization, User
from apps.spend import webhooks
from apps.spend.alert_models import AlertDelivery, WebhookEndpoint
from apps.spend.models import SpendAlert

log = logging.getLogger(__name__)

BATCH = 100
PAUSES_S = (15, 60, 300, 900, 3600, 3600 * 3, 3600 * 6, 3600 * 12)
"""Between tries; the last one is about a day after the first."""
TOLD_ROLES = (Membership.Role.OWNER, Membership.Role.ADMIN, Membership.Role.BILLING)


def deliver_due() -> int:
    """Write down whom each new alert goes to, then send what is due. Returns how many messages arrived.

    Several at once do no harm. I/O: SQL, the mail server, HTTP.
    """
    for alert_id in SpendAlert.objects.filter(delivered_at=None).order_by("id").values_list("pk", flat=True)[:BATCH]:
        _address(alert_id)
    arrived = 0
    for _ in range(BATCH):
        with transaction.atomic():
            # what is owed to an endpoint that pauses waits for it
            due = AlertDelivery.objects.filter(due_at__lte=timezone.now()).exclude(
                Q(endpoint__is_active=False) | Q(endpoint__is_blocked=True)
            )
            delivery = due.select_for_update(skip_locked=True, of=("self",)).select_related("alert", "endpoint").first()
            if delivery is None:
                break
            arrived += _send(delivery)
    return arrived


def describe(alert: SpendAlert) -> dict[str, Any]:
    """Return what a webhook is told. Money is whole nano-US-dollars, and text for people."""
    kind, _, name = alert.scope.partition(":")
    return {
        "type": "budget.threshold_passed",
        "timestamp": alert.created_at.isoformat(),
        "data": {
            "budget": alert.budget_id,
            "scope": {"kind": kind, "id": name},
            "period": alert.period,
            "period_start": alert.period_start.isoformat(),
            "threshold": alert.threshold,
            "spent_nanousd": alert.spent_nanousd,
            "limit_nanousd": alert.limit_nanousd,
            "text": summarize(alert),
        },
    }


def summarize(alert: SpendAlert) -> str:
    """Say in one sentence what happened."""
    limit = f" of {format_usd(alert.limit_nanousd)}" if alert.limit_nanousd is not None else ""
    period = "day" if alert.period == "daily" else "month"
    return (
        f"{name_scope(alert.scope)} spent {format_usd(alert.spent_nanousd)}{limit} this {period} and {_passed(alert)}."
    )


def _passed(alert: SpendAlert) -> str:
    """Say what was passed: a threshold, or the limit (`thresholds.limit_text`)."""
    if alert.threshold.startswith("limit "):
        return f"reached its {alert.threshold.replace(' ', ' of ', 1)}"
    return f"passed {alert.threshold}"


def name_scope(scope: str) -> str:
    """Name what a budget is for. I/O: one SQL statement for an organization, user or key."""
    kind, _, name = scope.partition(":")
    if kind == "site":
        return "The whole site"
    found: Any = None
    if kind == "organization":
        found = Organization.objects.filter(public_id=name).first()
    elif kind == "user":
        found = User.objects.filter(public_id=name).first()
    elif kind == "key":
        found = ApiKey.objects.filter(public_id=name).first()
    return f"The {kind} {found or name}"


def find_organization(scope: str) -> Organization | None:
    """Return whose money a scope is; None for the site, a plan, a model, or a person. I/O: one SQL statement."""
    kind, _, name = scope.partition(":")
    if kind == "organization":
        return Organization.objects.filter(public_id=name).first()
    if kind == "key":
        return Organization.objects.filter(api_keys__public_id=name).first()
    return None


def list_addresses(scope: str) -> list[str]:
    """Return who is told by mail: who manages the organization's money, the person, else the staff. I/O: SQL."""
    organization = find_organization(scope)
    kind, _, name = scope.partition(":")
    people = User.objects.filter(is_active=True)
    if organization is not None:
        people = people.filter(memberships__organization=organization, memberships__role__in=TOLD_ROLES)
    elif kind == "user":
        people = people.filter(public_id=name)
    else:
        people = people.filter(is_staff=True)
    return sorted(people.values_list("email", flat=True).distinct())


def _address(alert_id: int) -> None:
    """Write the messages that an alert owes, all or none."""
    with transaction.atomic():
        alert = SpendAlert.objects.select_for_update(skip_locked=True).filter(pk=alert_id, delivered_at=None).first()
        if alert is None:
            return
        now, organization = timezone.now(), find_organization(alert.scope)
        kind = alert.scope.partition(":")[0]
        owner = Q(organization=organization) if organization is not None else Q(organization=None)
        endpoints = WebhookEndpoint.objects.none() if kind == "user" else WebhookEndpoint.objects.filter(owner)
        owed = [AlertDelivery(alert=alert, email=email, due_at=now) for email in list_addresses(alert.scope)]
        owed += [
            AlertDelivery(alert=alert, endpoint=each, due_at=now)
            for each in endpoints.filter(is_active=True, is_blocked=False)
        ]
        AlertDelivery.objects.bulk_create(owed, ignore_conflicts=True)
        alert.delivered_at = now
        alert.save(update_fields=["delivered_at"])
        if not owed:
            log.warning("nobody is there to be told: %s", alert)


def _send(delivery: AlertDelivery) -> bool:
    now = timezone.now()
    delivery.attempts += 1
    try:
        if delivery.endpoint is not None:
            _send_webhook(delivery, delivery.endpoint)
        else:
            write_mail(delivery.alert, delivery.email).send()
    except (SMTPException, OSError, webhooks.NotDelivered) as error:
        is_last = delivery.attempts > len(PAUSES_S)
        delivery.due_at = None if is_last else now + timedelta(seconds=PAUSES_S[delivery.attempts - 1])
        delivery.error = str(error)[:200]
        log.warning("an alert did not arrive: %s", delivery.error, extra={"event": "alert.retry"})
    else:
        delivery.due_at, delivery.delivered_at, delivery.error = None, now, ""
    delivery.save(update_fields=["attempts", "due_at", "delivered_at", "error"])
    return delivery.delivered_at is not None


def _send_webhook(delivery: AlertDelivery, endpoint: WebhookEndpoint) -> None:
    result = webhooks.DELIVERED
    try:
        webhooks.send(endpoint, webhooks.name_message(delivery.alert_id, endpoint), describe(delivery.alert))
    except webhooks.NotDelivered as error:
        result = str(error)[:200]
        raise
    finally:
        WebhookEndpoint.objects.filter(pk=endpoint.pk).update(last_result=result, last_tried_at=timezone.now())


def write_mail(alert: SpendAlert, email: str) -> EmailMessage:
    """Write the mail to one person."""
    spent_all = alert.limit_nanousd is not None and alert.spent_nanousd >= alert.limit_nanousd
    context = {
        "summary": summarize(alert),
        "alert": alert,
        "is_limit": alert.threshold.startswith("limit ") or spent_all,
        "usage_link": settings.PUBLIC_URL + reverse("spend:usage"),
    }
    subject = f"Budget alert: {name_scope(alert.scope)} {_passed(alert)}"
    return EmailMessage(" ".join(subject.split())[:200], render_to_string("spend/mail/alert.txt", context), to=[email])
