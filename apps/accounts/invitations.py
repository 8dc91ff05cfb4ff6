"""Invite people to an organization by e-mail, and let them join.

An invitation is for one address. Its owner shows that it is theirs by the link in the mail, or by an address that they have
confirmed. Nothing that the inviting side sees tells whether the address has an account. The row is its own outbox: a mail that could
not be sent is due again.
"""

from datetime import timedelta

from allauth.account.models import EmailAddress
from django.core import signing
from django.core.exceptions import ValidationError
from django.core.validators import validate_email
from django.db import transaction
from django.utils import timezone

from aiscale.errors import AiscaleError, Code
from apps.accounts import audit, roles
from apps.accounts.models import Invitation, Membership, Organization, User
from apps.accounts.organizations import lock_for, refuse_personal
from apps.accounts.roles import Right, Role

LIFE = timedelta(days=7)
MAX_PENDING = 200
"""Invitations of one organization that wait for an answer."""

State = Invitation.State
_signer = signing.Signer(salt="aiscale.accounts.invitation")


def invite(
    by: User, organization: Organization, email: str, role: str, *, actor: audit.Actor | None = None
) -> Invitation:
    """Invite the owner of an address, or, when they are invited already, change their role and send the mail again.

    I/O: SQL, one Redis trip; `mail.send_due` sends the mail at once. Raises: AiscaleError (INVALID_REQUEST, PERMISSION_DENIED, NOT_FOUND,
    ALREADY_MEMBER, TOO_MANY_OBJECTS).
    """
    email = check_email(email)
    if role not in Role.values:
        raise AiscaleError(
            Code.INVALID_REQUEST, f"There is no role {role!r}; there are {', '.join(Role.values)}.", param="role"
        )
    with transaction.atomic():
        place = lock_for(by, organization, Right.INVITE)
        refuse_personal(place.organization, "It is for you alone.")
        roles.check_grant(place.role, role, "invite an owner")
        if place.organization.memberships.filter(user__email__iexact=email).exists():
            raise AiscaleError(Code.ALREADY_MEMBER, f"{email} is a member already.", param="email")
        pending = place.organization.invitations.filter(state=State.PENDING)
        found = pending.filter(email=email).first()
        if found is None:
            if pending.count() >= MAX_PENDING:
                raise AiscaleError(
                    Code.TOO_MANY_OBJECTS,
                    f"{MAX_PENDING} invitations wait for an answer already. Revoke some of them first.",
                )
            found = Invitation(organization=place.organization, email=email)
        else:
            roles.check_grant(place.role, found.role, "change an owner's invitation")
        found.role, found.invited_by = role, by
        return _renew(found, "invitation.create", actor or audit.by_user(by))


def resend(by: User, organization: Organization, invitation_id: str, *, actor: audit.Actor | None = None) -> Invitation:
    """Send the mail again; the link works for another seven days. I/O: SQL. Raises: AiscaleError (NOT_FOUND, PERMISSION_DENIED)."""
    with transaction.atomic():
        place = lock_for(by, organization, Right.INVITE)
        invitation = _get_pending(place.organization, invitation_id)
        roles.check_grant(place.role, invitation.role, "invite an owner")
        return _renew(invitation, "invitation.resend", actor or audit.by_user(by))


def revoke(by: User, organization: Organization, invitation_id: str, *, actor: audit.Actor | None = None) -> Invitation:
    """Take an invitation back; its link works no more. I/O: SQL. Raises: AiscaleError (NOT_FOUND, PERMISSION_DENIED)."""
    with transaction.atomic():
        place = lock_for(by, organization, Right.INVITE)
        invitation = _get_pending(place.organization, invitation_id)
        roles.check_grant(place.role, invitation.role, "take back an owner's invitation")
        return _end(invitation, State.REVOKED, "invitation.revoke", actor or audit.by_user(by))


def accept(user: User, invitation: Invitation, *, holds_link: bool, actor: audit.Actor | None = None) -> Membership:
    """Join, once. Holding the link confirms the address, as the confirmation mail does.

    I/O: SQL. Raises: AiscaleError (INVITATION_ENDED, PERMISSION_DENIED when it is for somebody else).
    """
    _check_addressee(user, invitation, holds_link=holds_link)
    with transaction.atomic():
        locked = _lock(invitation)
        if holds_link:
            confirm_address(user)
        membership, _ = Membership.objects.get_or_create(
            user=user, organization=locked.organization, defaults={"role": locked.role}
        )
        _end(locked, State.ACCEPTED, "invitation.accept", actor or audit.by_user(user))
    return membership


def decline(user: User | None, invitation: Invitation, *, holds_link: bool, actor: audit.Actor | None = None) -> None:
    """Say no. Whoever holds the link may, also without an account. I/O: SQL. Raises: AiscaleError as `accept`."""
    if not holds_link:
        assert user is not None
        _check_addressee(user, invitation, holds_link=False)
    who = actor or (audit.by_user(user) if user else audit.by_link(invitation.email))
    with transaction.atomic():
        _end(_lock(invitation), State.DECLINED, "invitation.decline", who)


def make_token(invitation: Invitation) -> str:
    """Return what stands in the link: the public id and our signature of it."""
    return _signer.sign(invitation.public_id)


def find_by_token(token: str) -> Invitation | None:
    """Return the invitation of a link, in whatever state it is; None for a link that we did not make. I/O: one SQL statement."""
    try:
        public_id = _signer.unsign(token.replace("\x00", ""))
    except signing.BadSignature:
        return None
    return (
        Invitation.objects.select_related("organization", "invited_by")
        .filter(public_id=public_id, organization__deleted_at=None)
        .first()
    )


def list_for(user: User) -> list[Invitation]:
    """List what a user may accept without the link: pending ones for an address that they have confirmed. I/O: two SQL statements."""
    if not is_confirmed(user):
        return []
    return list(
        Invitation.objects.select_related("organization", "invited_by")
        .filter(email=user.email.lower(), state=State.PENDING, expires_at__gt=timezone.now())
        .filter(organization__deleted_at=None)
        .order_by("-created_at")
    )


def is_for(user: User, invitation: Invitation) -> bool:
    """Tell whether the invitation is for this user's address, in any case."""
    return user.email.lower() == invitation.email


def is_confirmed(user: User) -> bool:
    """Tell whether the user has shown that their address is theirs. I/O: one SQL statement."""
    return bool(EmailAddress.objects.filter(user=user, email__iexact=user.email, verified=True).exists())


def confirm_address(user: User) -> None:
    """Note that the user's address is theirs. I/O: SQL."""
    address = EmailAddress.objects.filter(user=user, email__iexact=user.email).first()
    if address is None:
        address = EmailAddress(user=user, email=user.email, primary=True)
    address.verified = True
    address.save()


def check_email(email: str) -> str:
    """Return the address in lower case. Raises: AiscaleError (INVALID_REQUEST)."""
    email = email.strip().lower()
    try:
        if len(email) > 254:
            raise ValidationError("too long")
        validate_email(email)
    except ValidationError as error:
        raise AiscaleError(
            Code.INVALID_REQUEST, "This is no e-mail address. Write one such as ada@example.com.", param="email"
        ) from error
    return email


def ended() -> AiscaleError:
    return AiscaleError(
        Code.INVITATION_ENDED,
        "This invitation was used, taken back or is too old. Ask whoever invited you for a new one.",
    )


def _renew(invitation: Invitation, action: str, by: audit.Actor) -> Invitation:
    invitation.expires_at = timezone.now() + LIFE
    invitation.send_at, invitation.send_attempts = timezone.now(), 0
    invitation.save()
    _record(action, invitation, by)
    transaction.on_commit(_send_soon)
    return invitation


def _send_soon() -> None:
    """Have the mail sent now, by a worker of tasks: who invites does not wait for the mail server."""
    from apps.accounts import tasks

    tasks.send_soon()


def _get_pending(organization: Organization, invitation_id: str) -> Invitation:
    found = organization.invitations.filter(public_id=invitation_id.replace("\x00", ""), state=State.PENDING).first()
    if found is None:
        raise AiscaleError(Code.NOT_FOUND, "This invitation does not exist or was answered.", param="invitation_id")
    found.organization = organization
    return found


def _lock(invitation: Invitation) -> Invitation:
    """Lock the organization, then the invitation, as everybody does who changes members. Raises: AiscaleError (INVITATION_ENDED)."""
    organization = Organization.objects.select_for_update(no_key=True).filter(
        pk=invitation.organization_id, deleted_at=None
    )
    locked_organization = organization.first()
    locked = Invitation.objects.select_for_update().filter(pk=invitation.pk, state=State.PENDING).first()
    if locked_organization is None or locked is None or locked.is_expired:
        raise ended()
    locked.organization = locked_organization
    return locked


def _end(invitation: Invitation, state: str, action: str, by: audit.Actor) -> Invitation:
    invitation.state, invitation.ended_at, invitation.send_at = state, timezone.now(), None
    invitation.save(update_fields=["state", "ended_at", "send_at", "updated_at"])
    _record(action, invitation, by)
    return invitation


def _record(action: str, invitation: Invitation, by: audit.Actor) -> None:
    audit.record(
        action,
        target=f"invitation:{invitation.public_id}",
        by=by,
        organization_id=invitation.organization.public_id,
        details={"email": invitation.email, "role": invitation.role},
    )


def _check_addressee(user: User, invitation: Invitation, *, holds_link: bool) -> None:
    if not is_for(user, invitation):
        raise AiscaleError(
            Code.PERMISSION_DENIED,
            f"This invitation is for another address than {user.email}. Log in with the address that it was sent to.",
        )
    if not holds_link and not is_confirmed(user):
        raise AiscaleError(
            Code.PERMISSION_DENIED,
            "Confirm your e-mail address first, or follow the link in the invitation's mail.",
        )
