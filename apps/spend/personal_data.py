"""Say what spend keeps of a person (`apps.accounts.personal_data`). What was charged names ids alone, and stays."""

from collections.abc import Iterator
from typing import Any

from apps.accounts.models import Organization, User
from apps.spend.alert_models import AlertDelivery, WebhookEndpoint


def export(user: User) -> Iterator[tuple[str, Any]]:
    """Yield nothing: what was used is in the statements, as CSV."""
    yield from ()


def forget_person(user: User, addresses: set[str]) -> None:
    """Forget which alerts were mailed to them. I/O: one SQL statement."""
    AlertDelivery.objects.filter(email__in=addresses).delete()


def forget_organization(organization: Organization) -> None:
    """Tell its servers nothing any more. I/O: one SQL statement."""
    WebhookEndpoint.objects.filter(organization=organization).delete()
