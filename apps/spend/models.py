"""Keep what was used, what it cost, what may be spent and what is stopped."""

from typing import Any

from django.db import models, transaction
from django.db.models import F, Q
from django.db.models.functions import Now

from aiscale.db import NanoUsdField, Row, format_usd

LIMIT_CEILING_NANOUSD = 9_000_000 * 1_000_000_000
"""Lua's numbers are doubles: whole nano-dollars are exact up to about 9 million US dollars."""


class UsageRecord(models.Model):
    """State what one job used and cost. Written once by settlement; the database refuses changes.

    Identities are public ids in plain text, so that a record outlives what it names. ``occurred_at`` is when the job ended; its
    UTC month is the month that pays.
    """

    job_id = models.CharField(max_length=64, unique=True)
    request_id = models.CharField(max_length=128)
    organization_id = models.CharField(max_length=40)
    user_id = models.CharField(max_length=40, blank=True)
    key_id = models.CharField(max_length=40, blank=True)
    plan = models.CharField(max_length=64)
    source = models.CharField(max_length=16)
    kind = models.CharField(max_length=16)
    model = models.CharField(max_length=128)
    model_version = models.CharField(max_length=128)
    finish_reason = models.CharField(max_length=16)
    error_code = models.CharField(max_length=64, blank=True)
    prompt_tokens = models.BigIntegerField()
    completion_tokens = models.BigIntegerField()
    prompt_nanousd_per_token = NanoUsdField()
    completion_nanousd_per_token = NanoUsdField()
    hold_nanousd = NanoUsdField()
    cost_nanousd = NanoUsdField()
    worker_id = models.CharField(max_length=128, blank=True)
    queued_ms = models.BigIntegerField()
    first_token_ms = models.BigIntegerField(null=True)
    duration_ms = models.BigIntegerField()
    admitted_at = models.DateTimeField()
    occurred_at = models.DateTimeField()
    recorded_at = models.DateTimeField(db_default=Now())

    class Meta:
        constraints = [
            models.CheckConstraint(
                name="usage_is_never_negative",
                condition=Q(prompt_tokens__gte=0, completion_tokens__gte=0, cost_nanousd__gte=0),
            ),
        ]
        indexes = [
            models.Index(fields=["organization_id", "-occurred_at"], name="usage_by_organization"),
            models.Index(fields=["-occurred_at"], name="usage_by_time"),
            models.Index(fields=["model", "-occurred_at"], name="usage_by_model"),
        ]

    def __str__(self) -> str:
        return f"{self.job_id}: {format_usd(self.cost_nanousd)}"


class LedgerTransaction(Row):
    """Group entries that sum to zero. Written by ``ledger.post`` alone; the database refuses changes."""

    PUBLIC_ID_PREFIX = "lt"

    class Kind(models.TextChoices):
        USAGE = "usage"
        ADJUSTMENT = "adjustment"

    kind = models.CharField(max_length=16, choices=Kind.choices)
    reference = models.CharField(max_length=128)
    """What caused it; for usage the job id. Unique within a kind, so that nothing is posted twice."""
    memo = models.CharField(max_length=500, blank=True)
    occurred_at = models.DateTimeField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["kind", "reference"], name="ledger_reference_once")]
        indexes = [models.Index(fields=["-occurred_at"], name="ledger_by_time")]

    def __str__(self) -> str:
        return f"{self.kind} {self.reference}"


class LedgerEntry(models.Model):
    """Move ``amount_nanousd`` on one account: positive is a debit (an organization used something), negative a credit.

    ``occurred_at`` repeats the transaction's, so that a month's sum of an account reads one index and nothing else.
    """

    transaction = models.ForeignKey(LedgerTransaction, on_delete=models.PROTECT, related_name="entries")
    account = models.CharField(max_length=80)
    amount_nanousd = NanoUsdField()
    occurred_at = models.DateTimeField()

    class Meta:
        verbose_name_plural = "ledger entries"
        constraints = [
            models.CheckConstraint(name="ledger_entry_moves_something", condition=~Q(amount_nanousd=0)),
        ]
        indexes = [
            models.Index(fields=["account", "occurred_at"], include=["amount_nanousd"], name="ledger_by_account"),
        ]

    def __str__(self) -> str:
        return f"{self.account} {format_usd(self.amount_nanousd)}"


class KillSwitch(Row):
    """Say that everything of ``scope`` is stopped, by whom and why. A released one stays as history."""

    PUBLIC_ID_PREFIX = "kill"

    scope = models.CharField(max_length=160)
    reason = models.CharField(max_length=300)
    tripped_by = models.CharField(max_length=254)
    tripped_at = models.DateTimeField()
    released_by = models.CharField(max_length=254, blank=True)
    released_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        verbose_name_plural = "kill switches"
        constraints = [
            models.UniqueConstraint(
                fields=["scope"], condition=Q(released_at__isnull=True), name="kill_switch_once_per_scope"
            ),
        ]
        ordering = [F("released_at").desc(nulls_first=True), "-tripped_at"]

    def __str__(self) -> str:
        return f"{self.scope} ({'released' if self.released_at else 'in force'})"


class Budget(Row):
    """Replace the plan's monthly limit for one organization, upwards or downwards. In force once the transaction commits."""

    PUBLIC_ID_PREFIX = "budget"

    organization = models.OneToOneField("accounts.Organization", on_delete=models.CASCADE, related_name="budget")
    monthly_limit_nanousd = NanoUsdField()
    note = models.CharField(max_length=300, blank=True)

    class Meta:
        constraints = [
            models.CheckConstraint(
                name="budget_is_plausible",
                condition=Q(monthly_limit_nanousd__gte=0, monthly_limit_nanousd__lte=LIMIT_CEILING_NANOUSD),
            ),
        ]

    def __str__(self) -> str:
        return f"{self.organization}: {format_usd(self.monthly_limit_nanousd)} a month"

    def save(self, *args: Any, **kwargs: Any) -> None:
        super().save(*args, **kwargs)
        self._publish_on_commit()

    def delete(self, *args: Any, **kwargs: Any) -> tuple[int, dict[str, int]]:
        deleted = super().delete(*args, **kwargs)
        self._publish_on_commit()
        return deleted

    def _publish_on_commit(self) -> None:
        from apps.spend import balance  # balance reads this module's tables

        organization_id = self.organization.public_id
        transaction.on_commit(lambda: balance.publish(organization_id))
