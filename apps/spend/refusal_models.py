"""Keep which requests were refused and why, for a while; and how many, for longer. Part of `apps.spend.models`."""

from django.db import models
from django.db.models.functions import Now


class RefusedRequest(models.Model):
    """State one refusal: what its caller read, and the numbers behind it. In a flood, only a sample of them is kept."""

    request_id = models.CharField(max_length=128, unique=True)
    organization_id = models.CharField(max_length=40, blank=True)
    """Empty when nobody knows whose it was."""
    user_id = models.CharField(max_length=40, blank=True)
    key_id = models.CharField(max_length=40, blank=True)
    plan = models.CharField(max_length=64, blank=True)
    source = models.CharField(max_length=16)
    model = models.CharField(max_length=128, blank=True)
    code = models.CharField(max_length=64)
    message = models.CharField(max_length=1000)
    param = models.CharField(max_length=64, blank=True)
    facts = models.JSONField(default=dict)
    occurred_at = models.DateTimeField()
    recorded_at = models.DateTimeField(db_default=Now())

    class Meta:
        indexes = [
            models.Index(fields=["organization_id", "-occurred_at"], name="refused_by_organization"),
            models.Index(fields=["occurred_at"], name="refused_by_time"),
        ]

    def __str__(self) -> str:
        return f"{self.request_id}: {self.code}"


class RefusalCount(models.Model):
    """Count an organization's refusals of one code in one hour: all of them, whether they were kept or not."""

    organization_id = models.CharField(max_length=40, blank=True)
    code = models.CharField(max_length=64)
    hour = models.DateTimeField()
    count = models.BigIntegerField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["organization_id", "hour", "code"], name="refusal_count_once"),
        ]
        indexes = [models.Index(fields=["hour"], name="refusal_count_by_hour")]

    def __str__(self) -> str:
        return f"{self.organization_id or 'unknown'} {self.code} {self.hour:%Y-%m-%d %H}: {self.count}"
