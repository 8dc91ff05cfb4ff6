"""Send the mails of invitations, from the table, until the mail server has taken them."""

import logging
from datetime import timedelta
from smtplib import SMTPException

from django.conf import settings
from django.core.mail import EmailMessage
from django.db import transaction
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils import timezone

from apps.accounts import invitations
from apps.accounts.models import Invitation

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 8
BATCH = 50


def send_due() -> int:
    """Send what is due, and return how many mails were taken. Several at once do no harm.

    A mail that fails is due again, later each time; after eight failures it waits for a person to send it again. A process that dies
    between sending and noting it sends the mail, with the same link, once more. I/O: SQL, the mail server.
    """
    sent = 0
    for _ in range(BATCH):
        with transaction.atomic():
            now = timezone.now()
            due = Invitation.objects.filter(send_at__lte=now, expires_at__gt=now, state=Invitation.State.PENDING)
            invitation = (
                due.select_for_update(skip_locked=True, of=("self",))
                .select_related("organization", "invited_by")
                .first()
            )
            if invitation is None:
                break
            sent += _send(invitation)
    return sent


def write_invitation(invitation: Invitation) -> EmailMessage:
    """Write the mail. It holds the link, so nobody but the addressee may see it."""
    link = settings.PUBLIC_URL + reverse("accounts:invitation", args=[invitations.make_token(invitation)])
    context = {
        "invitation": invitation,
        "organization": invitation.organization,
        "link": link,
        "life": invitations.LIFE,
    }
    subject = " ".join(render_to_string("accounts/mail/invitation_subject.txt", context).split())
    return EmailMessage(subject, render_to_string("accounts/mail/invitation.txt", context), to=[invitation.email])


def _send(invitation: Invitation) -> bool:
    invitation.send_attempts += 1
    try:
        write_invitation(invitation).send()
    except (SMTPException, OSError) as error:
        wait_s = min(15 * 4 ** (invitation.send_attempts - 1), 3600)
        is_last = invitation.send_attempts >= MAX_ATTEMPTS
        invitation.send_at = None if is_last else timezone.now() + timedelta(seconds=wait_s)
        log.warning("an invitation's mail was not taken: %s", error, extra={"invitation_id": invitation.public_id})
    else:
        invitation.send_at, invitation.send_attempts = None, 0
    invitation.save(update_fields=["send_at", "send_attempts", "updated_at"])
    return invitation.send_attempts == 0
