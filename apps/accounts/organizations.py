"""Make sure that every user has an organization that pays."""

from django.db import IntegrityError, transaction

from apps.accounts.models import Membership, Organization, Plan, User
from apps.accounts.plans import DEFAULT_PLAN, seed_plans


def ensure_personal_organization(user: User, plan: str = DEFAULT_PLAN) -> Organization:
    """Return the user's own organization, making it on ``plan`` when there is none. I/O: SQL. Idempotent, also under races.

    Raises: Plan.DoesNotExist for an unknown plan.
    """
    found = Organization.objects.select_related("plan").filter(personal_of=user).first()
    if found is not None:
        return found
    if plan == DEFAULT_PLAN:
        seed_plans()
    chosen = Plan.objects.get(slug=plan)
    try:
        with transaction.atomic():
            made = Organization.objects.create(name=user.email[:120], plan=chosen, personal_of=user)
            Membership.objects.create(user=user, organization=made, role=Membership.Role.OWNER)
    except IntegrityError:
        # another request of the same user was first
        return Organization.objects.select_related("plan").get(personal_of=user)
    return made
