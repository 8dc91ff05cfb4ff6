"""Keep what was used, what it cost, what may be spent and what is stopped."""

from datetime import datetime
from typing import Any, Self

from django.db import models
from django.db.models import F, OuterRef, Q, Subquery
from django.db.models.functions import Now
from django.utils import timezone

from aiscale.db import NanoUsdField, Row, format_usd

LIMIT_CEILING_NANOUSD = 9_000_000 * 1_000_000_000
"""Lua's numbers are doubles: whole nano-dollars are exact up to about 9 million US dollars."""
PRICE_CEILING_NANOUSD_PER_TOKEN = 1_000_000_000
REQUEST_CEILING_NANOUSD = 1_000 * 1_000_000_000


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
    end_detail = models.CharField(max_length=300, blank=True, default="", db_default="")
    """Who or what ended it, in words: a kill switch's reason, what failed."""
    prompt_tokens = models.BigIntegerField()
    completion_tokens = models.BigIntegerField()
    cached_tokens = models.BigIntegerField(default=0, db_default=0)
    """Of the prompt, those that were taken from the cache."""
    price_id = models.CharField(max_length=40, blank=True, default="", db_default="")
    """The `Price` of admission; its numbers are repeated here. Empty: before prices had rows."""
    prompt_nanousd_per_token = NanoUsdField()
    cached_prompt_nanousd_per_token = NanoUsdField(null=True)
    completion_nanousd_per_token = NanoUsdField()
    request_nanousd = NanoUsdField(default=0, db_default=0)
    hold_nanousd = NanoUsdField()
    cost_nanousd = NanoUsdField()
    cache = models.CharField(max_length=8, blank=True, default="", db_default="")
    price_percent = models.PositiveSmallIntegerField(default=100, db_default=100)
    """What the plan asked for what was cached. Where that was all (``cache`` names its level), the prices here are so reduced."""
    saved_nanousd = NanoUsdField(default=0, db_default=0)
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
            models.Index(fields=["request_id"], name="usage_by_request"),
            models.Index(fields=["organization_id", "-occurred_at"], name="usage_by_organization"),
            # sums of budgets, from the index alone
            models.Index(fields=["occurred_at"], include=["cost_nanousd"], name="usage_cost_by_time"),
            models.Index(fields=["model", "occurred_at"], include=["cost_nanousd"], name="usage_cost_by_model"),
            models.Index(fields=["plan", "occurred_at"], include=["cost_nanousd"], name="usage_cost_by_plan"),
            models.Index(fields=["user_id", "occurred_at"], include=["cost_nanousd"], name="usage_cost_by_user"),
            models.Index(fields=["key_id", "occurred_at"], include=["cost_nanousd"], name="usage_cost_by_key"),
        ]

    def __str__(self) -> str:
        return f"{self.job_id}: {format_usd(self.cost_nanousd)}"


class LedgerTransactionQuerySet(models.QuerySet["LedgerTransaction"]):
    def list_corrections(self, since: datetime) -> Self:
        """Keep what is not usage and was written since. The index ``ledger_without_usage`` answers."""
        return self.exclude(kind="usage").filter(created_at__gte=since)


class LedgerTransaction(Row):
    """Group entries that sum to zero. Written by ``ledger.post`` alone; the database refuses changes."""

    PUBLIC_ID_PREFIX = "lt"

    class Kind(models.TextChoices):
        USAGE = "usage"
        CREDIT = "credit"
        REFUND = "refund"
        ADJUSTMENT = "adjustment"
        CARRYOVER = "carryover"

    kind = models.CharField(max_length=16, choices=Kind.choices)
    reference = models.CharField(max_length=128)
    """What caused it; for usage the job id. Unique within a kind, so that nothing is posted twice."""
    memo = models.CharField(max_length=500, blank=True)
    """Why, in words that the organization reads on its statement."""
    occurred_at = models.DateTimeField()

    objects = LedgerTransactionQuerySet.as_manager()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["kind", "reference"], name="ledger_reference_once")]
        indexes = [
            models.Index(fields=["-occurred_at"], name="ledger_by_time"),
            # all that people post, and what is carried over: few among the usage
            models.Index(fields=["created_at"], name="ledger_without_usage", condition=~Q(kind="usage")),
        ]

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


class PriceQuerySet(models.QuerySet["Price"]):
    def list_in_force(self, at: datetime) -> Self:
        """Keep each model's price of that moment. Of prices from the same moment on, the one written last counts."""
        return self.filter(valid_from__lte=at).order_by("model", "-valid_from", "-pk").distinct("model")

    def with_ends(self) -> Self:
        """Add ``valid_until``, the moment at which the model's next price begins: None for the last one, and its own beginning for one
        that was replaced before it began."""
        later = Q(valid_from__gt=OuterRef("valid_from")) | Q(valid_from=OuterRef("valid_from"), pk__gt=OuterRef("pk"))
        following = Price.objects.filter(later, model=OuterRef("model")).order_by("valid_from", "pk")
        return self.annotate(valid_until=Subquery(following.values("valid_from")[:1]))


class Price(Row):
    """State what a model costs from a moment on, until the next row of that model. The database refuses changes, and rows that begin in
    the past of a model that has a price: what was charged once stays explained.
    """

    PUBLIC_ID_PREFIX = "price"

    model = models.CharField(max_length=128)
    valid_from = models.DateTimeField()
    prompt_nanousd_per_token = NanoUsdField()
    cached_prompt_nanousd_per_token = NanoUsdField()
    completion_nanousd_per_token = NanoUsdField()
    request_nanousd = NanoUsdField(default=0)
    """For each request that computed something, whatever its length."""
    reason = models.CharField(max_length=300, blank=True)

    objects = PriceQuerySet.as_manager()

    class Meta:
        constraints = [
            models.CheckConstraint(
                name="price_is_possible",
                condition=Q(
                    prompt_nanousd_per_token__range=(0, PRICE_CEILING_NANOUSD_PER_TOKEN),
                    cached_prompt_nanousd_per_token__gte=0,
                    cached_prompt_nanousd_per_token__lte=F("prompt_nanousd_per_token"),
                    completion_nanousd_per_token__range=(0, PRICE_CEILING_NANOUSD_PER_TOKEN),
                    request_nanousd__range=(0, REQUEST_CEILING_NANOUSD),
                ),
            ),
        ]
        indexes = [models.Index(fields=["model", "-valid_from", "-id"], name="price_by_model")]
        ordering = ["model", "-valid_from", "-id"]

    def __str__(self) -> str:
        return f"{self.model} from {self.valid_from:%Y-%m-%d %H:%M}"


class Correction(models.Model):
    """Change what one request costs: a refund, or another price. The request's record stays as it was written.

    ``amount_nanousd`` is its share of ``transaction``'s entry on the organization's account: negative gives back. The database refuses
    changes, and corrections that sum to more than the record's cost.
    """

    usage = models.ForeignKey(UsageRecord, on_delete=models.PROTECT, related_name="corrections")
    transaction = models.ForeignKey(LedgerTransaction, on_delete=models.PROTECT, related_name="corrections")
    amount_nanousd = NanoUsdField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["usage", "transaction"], name="correction_once_in_a_transaction"),
            models.CheckConstraint(name="correction_changes_something", condition=~Q(amount_nanousd=0)),
        ]

    def __str__(self) -> str:
        return f"{self.usage_id}: {format_usd(self.amount_nanousd)}"


class Rerating(Row):
    """Order to charge past requests of a model at other prices. Requests that were admitted from ``since`` until before ``until``."""

    PUBLIC_ID_PREFIX = "rerate"

    model = models.CharField(max_length=128)
    since = models.DateTimeField()
    until = models.DateTimeField()
    prompt_nanousd_per_token = NanoUsdField()
    cached_prompt_nanousd_per_token = NanoUsdField()
    completion_nanousd_per_token = NanoUsdField()
    request_nanousd = NanoUsdField(default=0)
    reason = models.CharField(max_length=300)
    finished_at = models.DateTimeField(null=True, blank=True)
    """When all was adjusted, and what was still running then was waited for."""

    def __str__(self) -> str:
        return f"{self.model} from {self.since:%Y-%m-%d %H:%M} until {self.until:%Y-%m-%d %H:%M}"


class KillSwitch(Row):
    """Say that everything of ``scope`` is stopped, by whom, why and until when. A released one stays as history."""

    PUBLIC_ID_PREFIX = "kill"

    scope = models.CharField(max_length=160)
    reason = models.CharField(max_length=300)
    tripped_by = models.CharField(max_length=254)
    tripped_at = models.DateTimeField()
    until_at = models.DateTimeField("until", null=True, blank=True)
    """When it ends by itself; None: when somebody releases it."""
    released_by = models.CharField(max_length=254, blank=True)
    released_at = models.DateTimeField(null=True, blank=True)
    release_reason = models.CharField(max_length=300, blank=True, db_default="")

    class Meta:
        verbose_name_plural = "kill switches"
        constraints = [
            models.UniqueConstraint(
                fields=["scope"], condition=Q(released_at__isnull=True), name="kill_switch_once_per_scope"
            ),
        ]
        ordering = [F("released_at").desc(nulls_first=True), "-tripped_at"]

    def __str__(self) -> str:
        return f"{self.scope} ({'in force' if self.is_in_force else 'released'})"

    @property
    def is_in_force(self) -> bool:
        return self.released_at is None and (self.until_at is None or self.until_at > timezone.now())


class Budget(Row):
    """Limit what a scope spends in a day or a month, and say when it comes close. In force once the transaction commits.

    Scopes: ``site``, ``plan:<slug>``, ``model:<slug>``, ``organization:<id>``, ``user:<id>``, ``key:<id>``. An organization's monthly
    budget replaces its plan's monthly limit, upwards or downwards; one without a limit leaves that as it is.
    """

    PUBLIC_ID_PREFIX = "budget"

    class Period(models.TextChoices):
        DAILY = "daily", "a day"
        MONTHLY = "monthly", "a month"

    scope = models.CharField(max_length=170)
    period = models.CharField(max_length=16, choices=Period.choices, default=Period.MONTHLY)
    time_zone = models.CharField(max_length=64, blank=True)
    """IANA name; empty: the service's (AISCALE_TIME_ZONE)."""
    limit_nanousd = NanoUsdField(null=True, blank=True)
    """None: nothing is refused, thresholds alone count."""
    thresholds = models.JSONField(default=list, blank=True)
    """Texts such as ``80%`` (of the limit) and ``$100.00``, each of which alerts once a period."""
    raise_nanousd = NanoUsdField(default=0, db_default=0)
    """Added to the limit until ``raise_until``."""
    raise_until = models.DateTimeField(null=True, blank=True)
    note = models.CharField(max_length=300, blank=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["scope", "period"],
                name="budget_once",
                violation_error_message="There is a budget of this scope and period already: change that one.",
            ),
            models.CheckConstraint(name="budget_period_is_known", condition=Q(period__in=["daily", "monthly"])),
            models.CheckConstraint(
                name="budget_is_plausible",
                condition=Q(raise_nanousd__gte=0, raise_nanousd__lte=LIMIT_CEILING_NANOUSD)
                & (
                    Q(limit_nanousd__isnull=True)
                    | Q(limit_nanousd__gte=0, limit_nanousd__lte=LIMIT_CEILING_NANOUSD - F("raise_nanousd"))
                ),
                violation_error_message="Limit and raise together are at most 9 million US dollars.",
            ),
            models.CheckConstraint(
                name="budget_raise_ends",
                condition=Q(raise_nanousd=0) | Q(raise_until__isnull=False),
                violation_error_message="Say until when the limit is raised.",
            ),
        ]

    def __str__(self) -> str:
        limit = "no limit" if self.limit_nanousd is None else format_usd(self.limit_nanousd)
        return f"{self.scope}: {limit} {self.get_period_display()}"

    def save(self, *args: Any, **kwargs: Any) -> None:
        super().save(*args, **kwargs)
        self._publish()

    def delete(self, *args: Any, **kwargs: Any) -> tuple[int, dict[str, int]]:
        deleted = super().delete(*args, **kwargs)
        self._publish()
        return deleted

    def _publish(self) -> None:
        from apps.spend import balance  # balance reads this module's tables

        balance.publish_on_commit(self.scope)


class SpendAlert(models.Model):
    """Say that a budget's threshold was passed. Written once for each scope, period, start and threshold, in the transaction of the
    charge that passed it; delivered by apps.spend.alerts."""

    budget_id = models.CharField(max_length=40)
    """The budget's public id, in plain text: an alert outlives its budget, and a charge never waits for one that is being deleted."""
    scope = models.CharField(max_length=170)
    period = models.CharField(max_length=16, choices=Budget.Period.choices)
    period_start = models.DateTimeField()
    threshold = models.CharField(max_length=40)
    """As the budget has it, or ``limit $100.00``, which is reached or refuses."""
    spent_nanousd = NanoUsdField()
    limit_nanousd = NanoUsdField(null=True)
    created_at = models.DateTimeField(db_default=Now())
    delivered_at = models.DateTimeField(null=True, blank=True)
    """When its messages were written down (`AlertDelivery`), which then are sent one by one."""

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["scope", "period", "period_start", "threshold"], name="spend_alert_once"),
        ]
        indexes = [
            models.Index(fields=["created_at"], condition=Q(delivered_at__isnull=True), name="spend_alert_undelivered"),
        ]

    def __str__(self) -> str:
        return f"{self.scope} passed {self.threshold} at {format_usd(self.spent_nanousd)}"


class SpendTotal(models.Model):
    """Keep what a scope spent in one period of a budget: a sum of the ledger that is moved in the transaction that moves the ledger.

    ``revision`` grows with each change, so that a copy of this row knows whether another one is newer.
    """

    scope = models.CharField(max_length=170)
    period = models.CharField(max_length=16, choices=Budget.Period.choices)
    start_at = models.DateTimeField()
    end_at = models.DateTimeField()
    spent_nanousd = NanoUsdField(default=0)
    revision = models.BigIntegerField(default=1)
    updated_at = models.DateTimeField(db_default=Now())

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["scope", "period", "start_at", "end_at"], name="spend_total_once"),
        ]
        indexes = [
            models.Index(fields=["end_at"], name="spend_total_by_end"),
            models.Index(fields=["updated_at"], name="spend_total_by_change"),
        ]

    def __str__(self) -> str:
        return f"{self.scope} {self.period} from {self.start_at}: {format_usd(self.spent_nanousd)}"


from apps.spend.alert_models import AlertDelivery, WebhookEndpoint  # noqa: E402, F401  # tables of this app too
from apps.spend.refusal_models import RefusalCount as RefusalCount  # noqa: E402  # the tables of apps.spend.refusal_log
from apps.spend.refusal_models import RefusedRequest as RefusedRequest  # noqa: E402
