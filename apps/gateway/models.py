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


class Batch(Row):
    """Be one bulk job. Written by its API and, one process at a time, by who holds its lease."""

    PUBLIC_ID_PREFIX = "batch"

    class Status(models.TextChoices):
        VALIDATING = "validating"
        FAILED = "failed"
        IN_PROGRESS = "in_progress"
        FINALIZING = "finalizing"
        COMPLETED = "completed"
        EXPIRED = "expired"
        CANCELLING = "cancelling"
        CANCELLED = "cancelled"

    OPEN = (Status.VALIDATING, Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING)

    organization = models.ForeignKey("accounts.Organization", on_delete=models.PROTECT, related_name="+")
    key_digest = models.CharField(max_length=64)
    """Of the key that asked for it: who loses the key loses the rest of the batch."""
    endpoint = models.CharField(max_length=64)
    input_file_id = models.CharField(max_length=40)
    size_bytes = models.BigIntegerField(default=0, db_default=0)
    """Of the requests that came with it, which count against the organization's files while it is open; 0: they are in its file."""
    metadata = models.JSONField(default=dict)
    status = models.CharField(max_length=16, choices=Status.choices, default=Status.VALIDATING)
    outcome = models.CharField(max_length=16, choices=Status.choices, blank=True)
    """What it will be once its files are written."""
    problems = models.JSONField(default=list)
    """Why its file was refused: {"code", "line", "message", "param"}."""
    output_file_id = models.CharField(max_length=40, blank=True)
    error_file_id = models.CharField(max_length=40, blank=True)
    total_count = models.PositiveIntegerField(default=0)
    completed_count = models.PositiveIntegerField(default=0)
    failed_count = models.PositiveIntegerField(default=0)
    model = models.CharField(max_length=100, blank=True, default="", db_default="")
    """The one that all requests of its file ask for; '' where they ask for several, or leave it to us."""
    input_tokens = models.BigIntegerField(null=True)
    cached_tokens = models.BigIntegerField(null=True)
    """Of ``input_tokens``, those that were known."""
    output_tokens = models.BigIntegerField(null=True)
    """What its answers used until now; None, as the two above: it is not counted."""
    times = models.JSONField(default=dict)
    """Epoch seconds by name, such as ``in_progress_at``."""
    expires_at = models.DateTimeField()
    lease_holder = models.CharField(max_length=32, blank=True)
    lease_until = models.DateTimeField(null=True)
    due_at = models.DateTimeField(null=True)
    """Nothing is to be done before: a limit said so."""

    objects = OrganizationQuerySet.as_manager()

    class Meta:
        verbose_name_plural = "batches"
        indexes = [
            models.Index(fields=["organization", "-id"], name="batch_by_organization"),
            models.Index(
                fields=["id"],
                condition=models.Q(status__in=("validating", "in_progress", "finalizing", "cancelling")),
                name="batch_open",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.public_id} ({self.status})"


class BatchLine(models.Model):
    """Be one request of a batch, until the batch's files are written."""

    class State(models.TextChoices):
        WAITING = "waiting"
        RUNNING = "running"
        DONE = "done"

    batch = models.ForeignKey(Batch, on_delete=models.CASCADE, related_name="lines")
    number = models.PositiveIntegerField()
    custom_id = models.CharField(max_length=512)
    body = models.TextField()
    state = models.CharField(max_length=8, choices=State.choices, default=State.WAITING)
    attempt = models.PositiveSmallIntegerField(default=0)
    """Which try this is; its request and job are named after it."""
    status_code = models.PositiveSmallIntegerField(null=True)
    answer = models.TextField(blank=True)
    """The answer's body, as JSON."""

    class Meta:
        constraints = [models.UniqueConstraint(fields=["batch", "number"], name="batch_line_once")]
        indexes = [models.Index(fields=["batch", "state", "number"], name="batch_line_by_state")]

    def __str__(self) -> str:
        return f"{self.batch_id}:{self.number}"


class IdempotentRequest(models.Model):
    """Remember which request an Idempotency-Key of an organization stands for, and its answer."""

    organization_id = models.CharField(max_length=40)
    """The public id: an organization that is gone leaves nothing that anybody could ask for."""
    key = models.CharField(max_length=255)
    fingerprint = models.CharField(max_length=64)
    """sha256 of method, path, query and body."""
    request_id = models.CharField(max_length=64)
    holder = models.CharField(max_length=32)
    lease_until = models.DateTimeField()
    status = models.PositiveSmallIntegerField(null=True)
    headers = models.JSONField(default=list)
    body = models.BinaryField(null=True)
    """The answer, deflated; None while it is made."""
    expires_at = models.DateTimeField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["organization_id", "key"], name="idempotency_key_once")]
        indexes = [models.Index(fields=["expires_at"], name="idempotency_by_expiry")]

    def __str__(self) -> str:
        return f"{self.organization_id}: {self.request_id}"
