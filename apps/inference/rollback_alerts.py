"""Tell the staff that a canary was rolled back: by mail, and by the site's signed webhooks.

What is owed is written with the roll-back, in its transaction; each message is sent until it has arrived or a day has passed. A process
that dies in between tells somebody twice, with the same id, and never not at all.
"""

import logging
from datetime import timedelta
from smtplib import SMTPException
from typing import Any

from django.conf import settings
from django.core.mail import EmailMessage
from django.db import transaction
from django.utils import timezone

from apps.accounts.models import User
from apps.inference.models import ModelVersion
from apps.spend import webhooks
from apps.spend.alert_models import WebhookEndpoint
from apps.spend.alerts import PAUSES_S

log = logging.getLogger(__name__)


def owe(row: ModelVersion) -> None:
    """Write down who is to be told; the caller saves the row. I/O: one SQL statement."""
    endpoints = WebhookEndpoint.objects.filter(organization=None, is_active=True).order_by("pk")
    row.alert_due = True
    row.webhooks_owed = " ".join(endpoints.values_list("public_id", flat=True))
    row.webhooks_due_at = timezone.now() if row.webhooks_owed else None
    row.webhook_attempts = 0


def deliver_due() -> None:
    """Send what is due. Several at once do no harm. I/O: SQL, the mail server, HTTP."""
    _mail()
    for pk in ModelVersion.objects.filter(webhooks_due_at__lte=timezone.now()).values_list("pk", flat=True):
        with transaction.atomic():
            due = ModelVersion.objects.filter(pk=pk, webhooks_due_at__lte=timezone.now())
            row = due.select_for_update(skip_locked=True, of=("self",)).select_related("model").first()
            if row is not None:
                _call(row)


def describe(row: ModelVersion) -> dict[str, Any]:
    """Return what a webhook is told."""
    happened_at = row.rolled_back_at or row.updated_at
    return {
        "type": "model.canary_rolled_back",
        "timestamp": happened_at.isoformat(),
        "data": {
            "model": row.model.slug,
            "version": row.version,
            "main_version": row.model.version,
            "text": f"{row.model.slug} {row.version} was rolled back: {row.rolled_back_because}",
        },
    }


def _mail() -> None:
    staff = sorted(User.objects.filter(is_active=True, is_staff=True).values_list("email", flat=True))
    for row in ModelVersion.objects.filter(alert_due=True).select_related("model"):
        text = (
            f"Version {row.version} of {row.model.slug} was rolled back by itself: {row.rolled_back_because}.\n"
            f"All requests go to {row.model.version} again.\n\n{settings.PUBLIC_URL}/admin/inference/modelversion/{row.pk}/change/\n"
        )
        try:
            for email in staff:
                EmailMessage(f"Rolled back: {row.model.slug} {row.version}", text, to=[email]).send()
        except (SMTPException, OSError) as error:
            log.warning("the staff cannot be told of a roll-back yet: %s", error)
            return
        ModelVersion.objects.filter(pk=row.pk).update(alert_due=False)


def _call(row: ModelVersion) -> None:
    """Try each endpoint that is still to be told; who was told is not told again."""
    now, left = timezone.now(), []
    for endpoint in WebhookEndpoint.objects.filter(public_id__in=row.webhooks_owed.split(), is_active=True):
        result = webhooks.DELIVERED
        try:
            webhooks.send(endpoint, f"msg_{row.public_id}_{_stamp(row)}_{endpoint.public_id}", describe(row))
        except webhooks.NotDelivered as error:
            result = str(error)[:200]
            left.append(endpoint.public_id)
            log.warning("a webhook was not told of a roll-back: %s", result, extra={"event": "alert.retry"})
        WebhookEndpoint.objects.filter(pk=endpoint.pk).update(last_result=result, last_tried_at=now)
    row.webhook_attempts += 1
    is_last = not left or row.webhook_attempts > len(PAUSES_S)
    row.webhooks_owed = "" if is_last else " ".join(left)
    row.webhooks_due_at = None if is_last else now + timedelta(seconds=PAUSES_S[row.webhook_attempts - 1])
    row.save(update_fields=["webhooks_owed", "webhooks_due_at", "webhook_attempts"])


def _stamp(row: ModelVersion) -> int:
    """Tell two roll-backs of one version apart."""
    return int(row.rolled_back_at.timestamp()) if row.rolled_back_at is not None else 0
