"""Let an owner name, price, enable and disable models."""

from typing import Any

from django.contrib import admin
from django.db.models import OuterRef, QuerySet, Subquery
from django.db.models.functions import Now
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html
from unfold.admin import ModelAdmin

from aiscale.money_forms import format_per_million
from apps.inference.models import Model
from apps.spend.models import Price


@admin.register(Model)
class CatalogAdmin(ModelAdmin):  # type: ignore[misc]
    list_display = ["slug", "name", "kind", "is_enabled", "prompt_price", "completion_price", "version"]
    list_filter = ["kind", "is_enabled"]
    search_fields = ["slug", "name"]
    readonly_fields = ["prompt_price", "completion_price", "change_price", "slug", "kind", "version"]
    readonly_fields += ["context_tokens", "dimensions", "created_at", "updated_at"]
    fields = [
        "slug",
        "name",
        "description",
        "is_enabled",
        "prompt_price",
        "completion_price",
        "change_price",
        "kind",
        "version",
        "context_tokens",
        "dimensions",
        "created_at",
        "updated_at",
    ]

    def has_add_permission(self, request: HttpRequest) -> bool:
        """A model enters the catalog with its files, through ``seed_catalog``."""
        return False

    def get_queryset(self, request: HttpRequest) -> QuerySet[Model]:
        queryset: QuerySet[Model] = super().get_queryset(request)
        in_force = Price.objects.filter(model=OuterRef("slug"), valid_from__lte=Now()).order_by("-valid_from", "-pk")
        return queryset.annotate(
            prompt_nanousd=Subquery(in_force.values("prompt_nanousd_per_token")[:1]),
            completion_nanousd=Subquery(in_force.values("completion_nanousd_per_token")[:1]),
        )

    @admin.display(description="prompt, USD per million", ordering="prompt_nanousd")
    def prompt_price(self, model: Any) -> str:
        return _word(model.prompt_nanousd)

    @admin.display(description="completion, USD per million", ordering="completion_nanousd")
    def completion_price(self, model: Any) -> str:
        return _word(model.completion_nanousd)

    @admin.display(description="prices")
    def change_price(self, model: Model) -> str:
        url = reverse("admin:spend_price_add")
        listed = reverse("admin:spend_price_changelist")
        return format_html(
            '<a href="{0}?model={2}">Change the price</a> or <a href="{1}?model={2}">look at all of them</a>',
            url,
            listed,
            model.slug,
        )


def _word(nanousd_per_token: int | None) -> str:
    return "none: not served" if nanousd_per_token is None else format_per_million(nanousd_per_token)
