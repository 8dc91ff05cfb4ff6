"""Keep who did what: the table of `apps.accounts.audit`."""

from typing import Any

from django.db import models
from django.utils import timezone

from aiscale.db import make_public_id


class AuditEvent(models.Model):
    """Say who changed what, when and why. Written by ``audit.record`` alone; the database refuses changes.

    Names and ids are plain text, so that an event outlives what it names.
    """

    class ActorKind(models.TextChoices):
        USER = "user"
        COMMAND = "command"
        SYSTEM = "system"
        BUDGET = "budget"
        LINK = "link"

    public_id = models.CharField(max_length=40, unique=True, editable=False)
    at = models.DateTimeField(default=timezone.now)
    actor_kind = models.CharField(max_length=16, choices=ActorKind.choices)
    actor = models.CharField(max_length=254)
    actor_id = models.CharField(max_length=40, blank=True)
    address = models.GenericIPAddressField("IP address", null=True, blank=True)
    action = models.CharField(max_length=64)
    target = models.CharField(max_length=200)
    organization_id = models.CharField(max_length=40, blank=True)
    """The organization that it concerns; empty for what concerns the whole site."""
    reason = models.CharField(max_length=500, blank=True)
    details = models.JSONField(default=dict, blank=True)

    class Meta:
        ordering = ["-at", "-id"]
        indexes = [
            models.Index(fields=["-at"], name="audit_by_time"),
            models.Index(fields=["organization_id", "-at"], name="audit_by_organization"),
            models.Index(fields=["target", "-at"], name="audit_by_target"),
        ]

    def __str__(self) -> str:
        return f"{self.action} {self.target}"

    def save(self, *args: Any, **kwargs: Any) -> None:
        if not self.public_id:
            self.public_id = make_public_id("audit")
        super().save(*args, **kwargs)
