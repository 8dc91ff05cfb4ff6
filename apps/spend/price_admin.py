"""Show what models cost, cost and will cost, and add a price: with examples first, and doubts that must be answered."""

from datetime import datetime
from typing import Any

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db.models import Count, OuterRef, QuerySet, Subquery, Value
from django.db.models.functions import Coalesce, Concat
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils import timezone
from unfold.admin import ModelAdmin

from aiscale.db import format_usd
from aiscale.money_forms import format_per_million
from apps.accounts import audit
from apps.spend import confirmation, prices, rerating, tasks
from apps.spend.models import LedgerTransaction, Price, Rerating
from apps.spend.price_forms import PriceForm, RerateForm
from apps.spend.rerating import Order


@admin.register(Price)
class PriceAdmin(ModelAdmin):  # type: ignore[misc]
    list_display = ["model", "state", "prompt", "cached_prompt", "completion", "request_price", "valid_from", "until"]
    list_filter = ["model"]
    search_fields = ["=model", "=public_id"]
    search_help_text = "The exact name of a model, or a price's id."
    ordering = ["model", "-valid_from", "-pk"]
    fields = ["public_id", *list_display, "reason", "created_at"]
    readonly_fields = fields

    def get_queryset(self, request: HttpRequest) -> QuerySet[Price]:
        queryset: QuerySet[Price] = Price.objects.with_ends().order_by(*self.ordering)
        return queryset

    @admin.display(description="state")
    def state(self, price: Any) -> str:
        now = timezone.now()
        if price.valid_until == price.valid_from:
            return "replaced before it began"
        if price.valid_from > now:
            return "planned"
        return "in force" if price.valid_until is None or price.valid_until > now else "past"

    @admin.display(description="prompt, USD per million")
    def prompt(self, price: Price) -> str:
        return format_per_million(price.prompt_nanousd_per_token)

    @admin.display(description="cached prompt, USD per million")
    def cached_prompt(self, price: Price) -> str:
        return format_per_million(price.cached_prompt_nanousd_per_token)

    @admin.display(description="completion, USD per million")
    def completion(self, price: Price) -> str:
        return format_per_million(price.completion_nanousd_per_token)

    @admin.display(description="a request")
    def request_price(self, price: Price) -> str:
        return format_usd(price.request_nanousd)

    @admin.display(description="until")
    def until(self, price: Any) -> datetime | None:
        moment: datetime | None = price.valid_until
        return moment

    def has_change_permission(self, request: HttpRequest, obj: Price | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Price | None = None) -> bool:
        return False

    def add_view(self, request: HttpRequest, form_url: str = "", extra_context: Any = None) -> HttpResponse:
        if not self.has_add_permission(request):
            raise PermissionDenied
        form = PriceForm(request.POST or None, model=request.GET.get("model", ""))

        def preview(values: dict[str, Any]) -> list[str]:
            prices.check(form.read_terms())
            return prices.describe(values["model"], form.read_terms(), values["valid_from"])

        def doubts(values: dict[str, Any]) -> list[str]:
            current = prices.map_current(values["valid_from"])
            return prices.list_doubts(values["model"], form.read_terms(), current)

        def act(values: dict[str, Any]) -> str:
            price = prices.change(
                values["model"],
                form.read_terms(),
                valid_from=values["valid_from"],
                reason=values["reason"],
                by=audit.by_request(request),
                confirmed="sure" in request.POST,
            )
            return f"{price} has its new price."

        return confirmation.ask(
            request,
            form,
            context={**self.admin_site.each_context(request), "opts": self.opts},
            title="Change a price",
            button="Let this price hold",
            preview=preview,
            doubts=doubts,
            act=act,
            back=reverse("admin:spend_price_changelist"),
        )


@admin.register(Rerating)
class ReratingAdmin(ModelAdmin):  # type: ignore[misc]
    """Show which usage was rated again, and order it: with what changes for whom first."""

    list_display = ["model", "since", "until", "state", "adjusted", "reason", "created_at"]
    list_filter = ["model"]
    fields = ["public_id", *list_display, "prices", "finished_at"]
    readonly_fields = fields
    ordering = ["-pk"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Rerating]:
        queryset: QuerySet[Rerating] = super().get_queryset(request)
        posted = LedgerTransaction.objects.filter(
            kind=LedgerTransaction.Kind.ADJUSTMENT, reference__startswith=Concat(OuterRef("public_id"), Value(":"))
        )
        # counted in the list's own statement, not in one for each row
        count = posted.order_by().values("kind").annotate(count=Count("pk")).values("count")
        return queryset.annotate(adjusted=Coalesce(Subquery(count), 0))

    @admin.display(description="state")
    def state(self, order: Rerating) -> str:
        return "done" if order.finished_at else "open: requests that settle late are still adjusted"

    @admin.display(description="adjustments")
    def adjusted(self, order: Any) -> int:
        return int(order.adjusted)

    @admin.display(description="prices")
    def prices(self, order: Rerating) -> str:
        return " ".join(prices.describe(order.model, prices.terms_of(order))[:2])

    def has_change_permission(self, request: HttpRequest, obj: Rerating | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Rerating | None = None) -> bool:
        return False

    def has_add_permission(self, request: HttpRequest) -> bool:
        return bool(
            request.user.has_perm("spend.add_rerating") and request.user.has_perm("spend.add_ledgertransaction")
        )

    def add_view(self, request: HttpRequest, form_url: str = "", extra_context: Any = None) -> HttpResponse:
        if not self.has_add_permission(request):
            raise PermissionDenied
        form = RerateForm(request.POST or None, model=request.GET.get("model", ""))

        def read_order(values: dict[str, Any]) -> Order:
            return Order(values["model"], values["since"], values["until"], form.read_terms())

        def preview(values: dict[str, Any]) -> list[str]:
            wanted = read_order(values)
            return rerating.describe(wanted, rerating.preview(wanted))

        def act(values: dict[str, Any]) -> str:
            rerating.order(read_order(values), reason=values["reason"], by=audit.by_request(request))
            tasks.apply_soon()
            return "The usage is being rated again. The list says when it is done."

        return confirmation.ask(
            request,
            form,
            context={**self.admin_site.each_context(request), "opts": self.opts},
            title="Rate usage again",
            button="Post these adjustments",
            preview=preview,
            act=act,
            back=reverse("admin:spend_rerating_changelist"),
        )
