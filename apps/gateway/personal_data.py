"""Say what the gateway keeps (`apps.accounts.personal_data`): all of it is an organization's, nothing a person's."""

from collections.abc import Iterator
from typing import Any

from django.utils import timezone

from apps.accounts.models import Organization, User
from apps.gateway.models import Batch, IdempotentRequest, StoredFile, StoredResponse


def export(user: User) -> Iterator[tuple[str, Any]]:
    """Yield nothing: programs fetch files and responses by the API."""
    yield from ()


def forget_person(user: User, addresses: set[str]) -> None:
    """Do nothing: their personal organization is forgotten by `forget_organization`."""


def forget_organization(organization: Organization) -> None:
    """Delete responses, batches and remembered answers; the files' bytes go with the next tidying, within minutes. I/O: SQL."""
    now = timezone.now()
    StoredResponse.objects.filter(organization=organization).delete()
    Batch.objects.filter(organization=organization).delete()
    IdempotentRequest.objects.filter(organization_id=organization.public_id).delete()
    StoredFile.objects.filter(organization=organization).update(
        state=StoredFile.State.DELETING, filename="", expires_at=now, updated_at=now
    )
