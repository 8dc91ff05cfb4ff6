"""Keep what callers of the API ask to be kept."""

from typing import Any

from django.db import models
from django.utils import timezone

from aiscale.db import Row


class OrganizationQuerySet(models.QuerySet[Any]):
    def of(self, organization_id: str) -> "OrganizationQuerySet":
        """Narrow down to what an organization (by its public id) owns: all else does not exist for it."""
        return self.filter(organization__public_id=organization_id)


class StoredResponse(Row):
    """Keep one response of ``/v1/responses`` with its input, so that it can be fetched and continued until it expires."""

    PUBLIC_ID_PREFIX = "resp"

    class Status(models.TextChoices):
        IN_PROGRESS = "in_progress"
        COMPLETED = "completed"
        INCOMPLETE = "incomplete"
        FAILED = "failed"
        CANCELLED = "cancelled"

    organization = models.ForeignKey("accounts.Organization", on_delete=models.CASCADE, related_name="+")
    status = models.CharField(max_length=16, choices=Status.choices)
    job_id = models.CharField(max_length=64, unique=True)
    previous_id = models.CharField(max_length=40, blank=True)
    """The public id of the response that this one goes on from."""
    input_items = models.JSONField()
    """What was said to it, each {"role", "content"}, instructions left out."""
    response = models.JSONField()
    """The object as callers see it."""
    is_background = models.BooleanField(default=False)
    expires_at = models.DateTimeField()

    objects = OrganizationQuerySet.as_manager()

    class Meta:
        indexes = [
            models.Index(fields=["created_at"], condition=models.Q(status="in_progress"), name="response_in_progress"),
            models.Index(fields=["expires_at"], name="response_by_expiry"),
        ]

    def __str__(self) -> str:
        return f"{self.public_id} ({self.status})"

    @property
    def is_expired(self) -> bool:
        return self.expires_at <= timezone.now()
