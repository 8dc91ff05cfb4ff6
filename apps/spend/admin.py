"""Set budgets. Usage and the ledger are in `ledger_admin`, kill switches in `kill_admin`."""

from typing import Any

from django.contrib import admin, messages
from django.db import IntegrityError
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone
from unfold.admin import ModelAdmin

from aiscale.db import format_usd
from apps.accounts.audit_admin import Audited
from apps.spend import alert_admin, kill_admin, ledger_admin, price_admin, prices  # noqa: F401  # they register their pages
from apps.spend.forms import BudgetForm
from apps.spend.models import Budget
from apps.spend.scope_names import NamesScopes


@admin.register(Budget)
class BudgetAdmin(NamesScopes, Audited, ModelAdmin):  # type: ignore[misc]
    form = BudgetForm
    audit_as = "budget"
    list_display = ["scope_name", "period", "limit", "thresholds_in_words", "raised", "note", "updated_at"]
    list_filter = ["period"]
    search_fields = ["scope", "note"]
    ordering = ["scope", "period"]

    def get_fields(self, request: HttpRequest, obj: Budget | None = None) -> list[str]:
        rest = ["period", "time_zone", "limit_nanousd", "thresholds", "raise_nanousd", "raise_until", "note"]
        return ["scope_name", "scope", *rest] if obj else ["kind", "target", *rest]

    def get_readonly_fields(self, request: HttpRequest, obj: Budget | None = None) -> list[str]:
        # the gate's copies and the totals know a budget by both
        return ["scope_name", "scope", "period"] if obj else []

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

    def changeform_view(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().changeform_view(request, *args, **kwargs)
        except IntegrityError:
            # the same budget was made between this one's check and its saving, which is undone: checked again, the form says so
            return super().changeform_view(request, *args, **kwargs)

    def save_model(self, request: HttpRequest, obj: Budget, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        kind, _, name = obj.scope.partition(":")
        if kind == "model" and name not in prices.map_current():
            messages.warning(
                request, f"There is no model {name!r} yet. Until there is one, this budget limits nothing."
            )

    def audited_organization_id(self, obj: Budget) -> str:
        kind, _, name = obj.scope.partition(":")
        return str(name) if kind == "organization" else ""

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Budget]) -> None:
        # one by one: each tells the gate that the plan's limit is back, and is audited
        for budget in queryset:
            self.delete_model(request, budget)
