"""Show usage and the ledger (read only), and set budgets. Kill switches are in ``kill_admin``."""

from datetime import UTC, datetime
from typing import Any

from django.contrib import admin
from django.db.models import QuerySet, Sum
from django.http import HttpRequest
from django.utils import timezone
from unfold.admin import ModelAdmin, TabularInline

from aiscale.db import format_usd
from apps.spend import (
    kill_admin,  # noqa: F401  # registers its page
    periods,
)
from apps.spend.forms import BudgetForm
from apps.spend.models import Budget, LedgerEntry, LedgerTransaction, UsageRecord

BIGGEST_SPENDERS = 20


class ReadOnly:
    """Refuse every change through the admin: these rows are written by settlement alone."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class OrganizationFilter(admin.SimpleListFilter):
    """Offer the organizations that spent most this month; any other one is found by the search."""

    title = "organization (this month's biggest)"
    parameter_name = "organization_id"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        start, _ = periods.bounds(f"{datetime.now(UTC):%Y-%m}")
        spenders = (
            UsageRecord.objects.filter(occurred_at__gte=start)
            .values("organization_id")
            .annotate(cost=Sum("cost_nanousd"))
            .order_by("-cost")[:BIGGEST_SPENDERS]
        )
        return [(row["organization_id"], f"{row['organization_id']} ({format_usd(row['cost'])})") for row in spenders]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(organization_id=self.value()) if self.value() else queryset


@admin.register(UsageRecord)
class UsageRecordAdmin(ReadOnly, ModelAdmin):  # type: ignore[misc]
    list_display = [
        "occurred_at",
        "organization_id",
        "model",
        "source",
        "finish_reason",
        "prompt_tokens",
        "completion_tokens",
        "cost",
    ]
    list_filter = [OrganizationFilter, "model", "source", "finish_reason", "kind"]
    search_fields = ["=organization_id", "=job_id", "=request_id", "=user_id", "=key_id"]
    search_help_text = "The exact id of an organization, job, request, user or key."
    date_hierarchy = "occurred_at"
    ordering = ["-occurred_at"]
    show_full_result_count = False
    exclude = ["cost_nanousd", "hold_nanousd", "prompt_nanousd_per_token", "completion_nanousd_per_token"]
    readonly_fields = ["cost", "held_at_most", "prompt_price", "completion_price"]

    @admin.display(description="cost", ordering="cost_nanousd")
    def cost(self, record: UsageRecord) -> str:
        return format_usd(record.cost_nanousd)

    @admin.display(description="held at most")
    def held_at_most(self, record: UsageRecord) -> str:
        return format_usd(record.hold_nanousd)

    @admin.display(description="price of a million prompt tokens")
    def prompt_price(self, record: UsageRecord) -> str:
        return format_usd(record.prompt_nanousd_per_token * 1_000_000)

    @admin.display(description="price of a million completion tokens")
    def completion_price(self, record: UsageRecord) -> str:
        return format_usd(record.completion_nanousd_per_token * 1_000_000)


class EntryInline(ReadOnly, TabularInline):  # type: ignore[misc]
    model = LedgerEntry
    fields = ["account", "amount"]
    readonly_fields = ["account", "amount"]
    extra = 0

    @admin.display(description="amount")
    def amount(self, entry: LedgerEntry) -> str:
        return format_usd(entry.amount_nanousd)


@admin.register(LedgerTransaction)
class LedgerTransactionAdmin(ReadOnly, ModelAdmin):  # type: ignore[misc]
    list_display = ["occurred_at", "kind", "reference", "debited"]
    list_filter = ["kind"]
    search_fields = ["=reference", "=public_id"]
    search_help_text = "The exact job id or transaction id."
    date_hierarchy = "occurred_at"
    ordering = ["-occurred_at"]
    show_full_result_count = False
    fields = ["public_id", "kind", "reference", "memo", "occurred_at", "created_at"]
    inlines = [EntryInline]

    def get_queryset(self, request: HttpRequest) -> QuerySet[LedgerTransaction]:
        queryset: QuerySet[LedgerTransaction] = super().get_queryset(request)
        return queryset.prefetch_related("entries")

    @admin.display(description="debited")
    def debited(self, transaction: LedgerTransaction) -> str:
        return format_usd(sum(entry.amount_nanousd for entry in transaction.entries.all() if entry.amount_nanousd > 0))


@admin.register(Budget)
class BudgetAdmin(ModelAdmin):  # type: ignore[misc]
    form = BudgetForm
    list_display = ["scope", "period", "limit", "thresholds_in_words", "raised", "note", "updated_at"]
    list_filter = ["period"]
    search_fields = ["scope", "note"]
    ordering = ["scope", "period"]

    def get_fields(self, request: HttpRequest, obj: Budget | None = None) -> list[str]:
        rest = ["period", "time_zone", "limit_nanousd", "thresholds", "raise_nanousd", "raise_until", "note"]
        return ["scope", *rest] if obj else ["kind", "target", *rest]

    def get_readonly_fields(self, request: HttpRequest, obj: Budget | None = None) -> list[str]:
        # the gate's copies and the totals know a budget by both
        return ["scope", "period"] if obj else []

    @admin.display(description="limit", ordering="limit_nanousd")
    def limit(self, budget: Budget) -> str:
        return "alerts only" if budget.limit_nanousd is None else format_usd(budget.limit_nanousd)

    @admin.display(description="alerts at")
    def thresholds_in_words(self, budget: Budget) -> str:
        return ", ".join(budget.thresholds) or "-"

    @admin.display(description="raised by", ordering="raise_until")
    def raised(self, budget: Budget) -> str:
        if not budget.raise_nanousd or budget.raise_until is None or budget.raise_until <= timezone.now():
            return "-"
        return f"{format_usd(budget.raise_nanousd)} until {budget.raise_until:%-d %B %Y %H:%M} (UTC)"

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Budget]) -> None:
        # one by one: each tells the gate that the plan's limit is back
        for budget in queryset:
            budget.delete()
