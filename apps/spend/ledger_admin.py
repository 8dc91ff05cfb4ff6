"""Show usage and the ledger, which nobody changes, and let an administrator credit, refund and adjust."""

from datetime import UTC, datetime
from typing import Any

from django.contrib import admin
from django.db.models import QuerySet, Sum
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect
from django.urls import reverse
from django.utils.html import format_html_join
from unfold.admin import ModelAdmin, TabularInline
from unfold.decorators import action

from aiscale.db import NanoUsdField, format_usd
from apps.accounts import audit
from apps.spend import confirmation, corrections, periods, scope_names
from apps.spend.correction_forms import AdjustmentForm, CreditForm, RefundForm
from apps.spend.models import Correction, LedgerEntry, LedgerTransaction, RefusedRequest, UsageRecord
from apps.spend.refusal_log import describe_facts
from apps.spend.scope_names import NamesOrganizations, map_organizations
from apps.spend.templatetags.money import fact, fact_name

BIGGEST_SPENDERS = 20


class ReadOnly:
    """Refuse every change through the admin: these rows are written by settlement and by `corrections` alone."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_correct_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return bool(request.user.has_perm("spend.add_ledgertransaction"))


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
        names = map_organizations(row["organization_id"] for row in spenders)
        return [
            (
                row["organization_id"],
                f"{names.get(row['organization_id'], row['organization_id'])} ({format_usd(row['cost'])})",
            )
            for row in spenders
        ]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(organization_id=self.value()) if self.value() else queryset


class CorrectionInline(ReadOnly, TabularInline):  # type: ignore[misc]
    model = Correction
    fields = ["transaction", "amount", "why"]
    readonly_fields = fields
    extra = 0

    def get_queryset(self, request: HttpRequest) -> QuerySet[Correction]:
        queryset: QuerySet[Correction] = super().get_queryset(request)
        return queryset.select_related("transaction", "usage")

    @admin.display(description="amount")
    def amount(self, correction: Correction) -> str:
        return format_usd(correction.amount_nanousd)

    @admin.display(description="why")
    def why(self, correction: Correction) -> str:
        return correction.transaction.memo


@admin.register(UsageRecord)
class UsageRecordAdmin(NamesOrganizations, ReadOnly, ModelAdmin):  # type: ignore[misc]
    list_display = [
        "occurred_at",
        "organization",
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
    exclude = [field.name for field in UsageRecord._meta.fields if isinstance(field, NanoUsdField)]
    readonly_fields = ["cost", "held_at_most", "saved", "prompt_price", "cached_prompt_price", "completion_price"]
    readonly_fields += ["request_price"]
    actions_detail = ["explain", "refund"]

    def get_inlines(self, request: HttpRequest, obj: UsageRecord | None) -> list[Any]:
        # a head without rows tells nothing
        return [CorrectionInline] if obj and obj.corrections.exists() else []

    @action(description="Explain", url_path="explain", permissions=["view"])
    def explain(self, request: HttpRequest, object_id: int) -> HttpResponse:
        """Go to the page that says why this request costs what it costs."""
        record = get_object_or_404(UsageRecord, pk=object_id)
        return redirect("spend:request", record.request_id)

    @action(description="Refund", url_path="refund", permissions=["correct"])
    def refund(self, request: HttpRequest, object_id: int) -> HttpResponse:
        """Give back what this request cost, or a part of it."""
        record = get_object_or_404(UsageRecord, pk=object_id)
        left = corrections.count_left(record)

        def preview(values: dict[str, Any]) -> list[str]:
            corrections.check_refund(record, values["amount"])
            rest = f"Of {format_usd(left)} that request {record.request_id} costs, {format_usd(left - values['amount'])} is left."
            return [corrections.preview(record.organization_id, -values["amount"]).describe(), rest]

        def act(values: dict[str, Any]) -> str:
            by = audit.by_request(request)
            corrections.refund(record, values["amount"], reason=values["reason"], by=by, reference=values["reference"])
            return f"{format_usd(values['amount'])} is given back."

        return confirmation.ask(
            request,
            RefundForm(request.POST or None, initial={"amount": left}),
            context={**self.admin_site.each_context(request), "opts": self.opts},
            title=f"Refund request {record.request_id}",
            button="Give it back",
            preview=preview,
            act=act,
            back=reverse("admin:spend_usagerecord_change", args=[record.pk]),
        )

    @admin.display(description="cost", ordering="cost_nanousd")
    def cost(self, record: UsageRecord) -> str:
        return format_usd(record.cost_nanousd)

    @admin.display(description="held at most")
    def held_at_most(self, record: UsageRecord) -> str:
        return format_usd(record.hold_nanousd)

    @admin.display(description="saved by the cache")
    def saved(self, record: UsageRecord) -> str:
        return format_usd(record.saved_nanousd)

    @admin.display(description="price of a million prompt tokens")
    def prompt_price(self, record: UsageRecord) -> str:
        return format_usd(record.prompt_nanousd_per_token * 1_000_000)

    @admin.display(description="price of a million cached prompt tokens")
    def cached_prompt_price(self, record: UsageRecord) -> str:
        price = record.cached_prompt_nanousd_per_token
        return "as of other prompt tokens" if price is None else format_usd(price * 1_000_000)

    @admin.display(description="price of a million completion tokens")
    def completion_price(self, record: UsageRecord) -> str:
        return format_usd(record.completion_nanousd_per_token * 1_000_000)

    @admin.display(description="price of a request")
    def request_price(self, record: UsageRecord) -> str:
        return format_usd(record.request_nanousd)


class EntryInline(ReadOnly, TabularInline):  # type: ignore[misc]
    model = LedgerEntry
    fields = ["account_name", "account", "amount"]
    readonly_fields = fields
    extra = 0
    # it would repeat the columns
    hide_title = True

    @admin.display(description="of")
    def account_name(self, entry: LedgerEntry) -> str:
        return scope_names.name_one(entry.account)

    @admin.display(description="amount")
    def amount(self, entry: LedgerEntry) -> str:
        return format_usd(entry.amount_nanousd)


@admin.register(RefusedRequest)
class RefusedRequestAdmin(NamesOrganizations, ReadOnly, ModelAdmin):  # type: ignore[misc]
    list_display = ["occurred_at", "code", "organization", "model", "source", "message"]
    list_filter = ["code", "source"]
    search_fields = ["=request_id", "=organization_id", "=user_id", "=key_id"]
    search_help_text = (
        "The exact id of a request, organization, user or key. Of many refusals at once only some are here."
    )
    date_hierarchy = "occurred_at"
    ordering = ["-occurred_at"]
    show_full_result_count = False
    exclude = ["facts"]
    readonly_fields = ["numbers"]

    @admin.display(description="numbers")
    def numbers(self, refused: RefusedRequest) -> str:
        lines = [(fact_name(name), fact(value, name)) for name, value in describe_facts(refused.facts).items()]
        return format_html_join("", "<p>{}: {}</p>", lines) or "-"


@admin.register(LedgerTransaction)
class LedgerTransactionAdmin(ReadOnly, ModelAdmin):  # type: ignore[misc]
    list_display = ["occurred_at", "kind", "reference", "debited"]
    list_filter = ["kind"]
    search_fields = ["=reference", "=public_id", "=entries__account"]
    search_help_text = "The exact job id, transaction id or account, such as organization:org_01jb..."
    date_hierarchy = "occurred_at"
    ordering = ["-occurred_at"]
    show_full_result_count = False
    fields = ["public_id", "kind", "reference", "memo", "occurred_at", "created_at"]
    inlines = [EntryInline]
    actions_list = ["credit", "adjust"]

    @action(description="Give a credit", url_path="credit", permissions=["correct"])
    def credit(self, request: HttpRequest) -> HttpResponse:
        """Let an organization spend more."""

        def act(values: dict[str, Any]) -> str:
            corrections.give_credit(
                values["organization"],
                values["amount"],
                source=values["source"],
                reason=values["reason"],
                by=audit.by_request(request),
                reference=values["reference"],
            )
            return f"{format_usd(values['amount'])} is credited."

        return self._ask(
            request,
            CreditForm(request.POST or None, initial={"organization": request.GET.get("organization", "")}),
            title="Give a credit",
            button="Give this credit",
            preview=lambda values: [
                corrections.preview(values["organization"], -values["amount"]).describe(),
                "What is not used by the end of the month goes along into the next one.",
            ],
            act=act,
        )

    @action(description="Adjust charges", url_path="adjust", permissions=["correct"])
    def adjust(self, request: HttpRequest) -> HttpResponse:
        """Mend a wrong charge."""
        form = AdjustmentForm(request.POST or None, initial={"organization": request.GET.get("organization", "")})

        def act(values: dict[str, Any]) -> str:
            corrections.adjust(
                values["organization"],
                form.signed_nanousd(),
                reason=values["reason"],
                by=audit.by_request(request),
                reference=values["reference"],
            )
            return "The charges are adjusted."

        return self._ask(
            request,
            form,
            title="Adjust charges",
            button="Post this adjustment",
            preview=lambda values: [corrections.preview(values["organization"], form.signed_nanousd()).describe()],
            act=act,
        )

    def _ask(self, request: HttpRequest, form: Any, **what: Any) -> HttpResponse:
        context = {**self.admin_site.each_context(request), "opts": self.opts}
        back = reverse("admin:spend_ledgertransaction_changelist")
        return confirmation.ask(request, form, context=context, back=back, **what)

    def get_queryset(self, request: HttpRequest) -> QuerySet[LedgerTransaction]:
        queryset: QuerySet[LedgerTransaction] = super().get_queryset(request)
        return queryset.prefetch_related("entries")

    @admin.display(description="debited")
    def debited(self, transaction: LedgerTransaction) -> str:
        return format_usd(sum(entry.amount_nanousd for entry in transaction.entries.all() if entry.amount_nanousd > 0))
