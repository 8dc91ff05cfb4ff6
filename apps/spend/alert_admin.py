"""Show alerts and what became of them, and keep the webhook endpoints that are told."""

from typing import Any

from django.contrib import admin, messages
from django.db import models
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.html import format_html
from unfold.admin import ModelAdmin, TabularInline

from aiscale import sealing
from aiscale.autocompletes import Autocompletes
from aiscale.db import format_usd
from apps.accounts import audit
from apps.spend import alerts, webhooks
from apps.spend.alert_models import AlertDelivery, WebhookEndpoint
from apps.spend.ledger_admin import ReadOnly
from apps.spend.models import SpendAlert
from apps.spend.scope_names import NamesScopes


class DeliveryInline(ReadOnly, TabularInline):  # type: ignore[misc]
    model = AlertDelivery
    fields = readonly_fields = ["to", "outcome"]
    extra = 0
    hide_title = True

    def get_queryset(self, request: HttpRequest) -> QuerySet[AlertDelivery]:
        queryset: QuerySet[AlertDelivery] = super().get_queryset(request)
        return queryset.select_related("endpoint")

    @admin.display(description="to")
    def to(self, delivery: AlertDelivery) -> str:
        return format_html('<span class="break-words">{}</span>', delivery.email or delivery.endpoint)

    @admin.display(description="outcome")
    def outcome(self, delivery: AlertDelivery) -> str:
        return delivery.describe()


@admin.register(SpendAlert)
class SpendAlertAdmin(NamesScopes, ReadOnly, ModelAdmin):  # type: ignore[misc]
    list_display = ["created_at", "scope_name", "period", "period_start", "threshold", "spent", "arrived"]
    list_filter = ["period"]
    search_fields = ["=scope", "=budget_id"]
    date_hierarchy = "created_at"
    ordering = ["-created_at"]
    fields = readonly_fields = ["summary", "scope", "period", "period_start", "threshold", "spent", "created_at"]
    inlines = [DeliveryInline]

    def get_queryset(self, request: HttpRequest) -> QuerySet[SpendAlert]:
        queryset: QuerySet[SpendAlert] = super().get_queryset(request)
        return queryset.prefetch_related("deliveries")

    def get_inlines(self, request: HttpRequest, obj: SpendAlert | None) -> list[Any]:
        # a head without rows tells nothing
        return self.inlines if obj and obj.deliveries.all() else []

    @admin.display(description="what happened")
    def summary(self, alert: SpendAlert) -> str:
        return alerts.summarize(alert)

    @admin.display(description="spent", ordering="spent_nanousd")
    def spent(self, alert: SpendAlert) -> str:
        return format_usd(alert.spent_nanousd)

    @admin.display(description="arrived")
    def arrived(self, alert: SpendAlert) -> str:
        owed = list(alert.deliveries.all())
        return f"{sum(each.delivered_at is not None for each in owed)} of {len(owed)}"


@admin.register(WebhookEndpoint)
class WebhookEndpointAdmin(Autocompletes, ModelAdmin):  # type: ignore[misc]
    list_display = ["url", "organization", "is_active", "is_blocked", "last_result", "last_tried_at"]
    list_filter = ["is_active", "is_blocked"]
    search_fields = ["url", "=organization__public_id", "organization__name"]
    list_select_related = ["organization"]
    autocomplete_fields = ["organization"]
    fields = ["url", "organization", "is_active", "is_blocked", "last_result", "last_tried_at"]
    readonly_fields = ["last_result", "last_tried_at"]
    actions = ["send_test"]
    formfield_overrides = {models.URLField: {"assume_scheme": "https"}}

    def formfield_for_foreignkey(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> Any:
        kwargs.setdefault("help_text", "Whose alerts it is told; empty: those of the whole service.")
        return super().formfield_for_foreignkey(db_field, request, **kwargs)

    def get_readonly_fields(self, request: HttpRequest, obj: WebhookEndpoint | None = None) -> list[str]:
        # who is told what must not change under a secret that somebody else holds
        return [*self.readonly_fields, "organization"] if obj else list(self.readonly_fields)

    def save_model(self, request: HttpRequest, obj: WebhookEndpoint, form: Any, change: bool) -> None:
        secret = ""
        if not change:
            secret = webhooks.make_secret()
            obj.sealed_secret = sealing.seal(secret)
        super().save_model(request, obj, form, change)
        audit.record(
            "webhook.change" if change else "webhook.create",
            target=f"webhook:{obj.public_id}",
            by=audit.by_request(request),
            organization_id=obj.organization.public_id if obj.organization else "",
            details={"url": obj.url, "is_active": obj.is_active, "is_blocked": obj.is_blocked},
        )
        if secret:
            messages.warning(request, f"The endpoint's signing secret, shown only now: {secret}")

    def delete_model(self, request: HttpRequest, obj: WebhookEndpoint) -> None:
        audit.record(
            "webhook.delete",
            target=f"webhook:{obj.public_id}",
            by=audit.by_request(request),
            organization_id=obj.organization.public_id if obj.organization else "",
            details={"url": obj.url},
        )
        super().delete_model(request, obj)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[WebhookEndpoint]) -> None:
        for endpoint in queryset.select_related("organization"):
            self.delete_model(request, endpoint)

    @admin.action(description="Send a test message", permissions=["change"])
    def send_test(self, request: HttpRequest, queryset: QuerySet[WebhookEndpoint]) -> None:
        for endpoint in queryset.select_related("organization"):
            error = webhooks.send_test(endpoint)
            if error:
                messages.error(request, f"{endpoint.url}: {error}.")
            else:
                messages.success(request, f"{endpoint.url} took the test message.")
