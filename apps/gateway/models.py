"""Keep what callers of the API ask to be kept."""

from typing import Any

from django.db import models
from django.utils import timezone

from aiscale.db import Row


class OrganizationQuerySet(models.QuerySet[Any]):
    def of(self, organization_id: str) -> "OrganizationQuerySet":
        """Narrow down to what an organization (by its public id) owns: all else does not exist for it."""
        return self.filter(organization__public_id=organization_id)


class StoredFile(Row):
    """Keep the facts of one file; its bytes are in the storage ``files`` under ``storage_name``."""

    PUBLIC_ID_PREFIX = "file"

    class State(models.TextChoices):
        UPLOADING = "uploading"
        READY = "ready"
        DELETING = "deleting"

    organization = models.ForeignKey("accounts.Organization", on_delete=models.PROTECT, related_name="+")
    state = models.CharField(max_length=16, choices=State.choices)
    purpose = models.CharField(max_length=32)
    filename = models.CharField(max_length=255)
    size_bytes = models.BigIntegerField()
    storage_name = models.CharField(max_length=200)
    expires_at = models.DateTimeField(null=True)

    objects = OrganizationQuerySet.as_manager()

    class Meta:
        constraints = [models.CheckConstraint(name="file_size_is_possible", condition=models.Q(size_bytes__gte=0))]
        indexes = [
            models.Index(fields=["organization", "state", "-id"], name="file_by_organization"),
            models.Index(fields=["state", "updated_at"], condition=~models.Q(state="ready"), name="file_half_done"),
            models.Index(fields=["expires_at"], condition=models.Q(expires_at__isnull=False), name="file_by_expiry"),
        ]

    def __str__(self) -> str:
        return f"{self.public_id} ({self.filename})"


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
