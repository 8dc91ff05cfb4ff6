"""Let an owner name, price, enable and disable models."""

from decimal import Decimal
from typing import Any

from django import forms
from django.contrib import admin
from django.http import HttpRequest
from unfold.admin import ModelAdmin
from unfold.widgets import UnfoldAdminDecimalFieldWidget

from apps.inference.models import Model

MILLION = 1_000_000
NANOUSD_PER_TOKEN_OF_USD_PER_MILLION = 1_000
"""1 USD for a million tokens is 1,000 nano-USD for each."""


class PriceField(forms.DecimalField):
    """Take US dollars for a million tokens, exactly, and give nano-USD a token."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            min_value=Decimal(0),
            max_value=Decimal(MILLION),
            decimal_places=3,
            widget=UnfoldAdminDecimalFieldWidget,
            **kwargs,
        )

    def clean(self, value: Any) -> int | None:
        usd = super().clean(value)
        return None if usd is None else int(usd * NANOUSD_PER_TOKEN_OF_USD_PER_MILLION)

    def prepare_value(self, value: Any) -> Any:
        if not isinstance(value, int):
            return value
        return f"{(Decimal(value) / NANOUSD_PER_TOKEN_OF_USD_PER_MILLION).normalize():f}"

    def has_changed(self, initial: Any, data: Any) -> bool:
        return bool(super().has_changed(self.prepare_value(initial), data))


class ModelForm(forms.ModelForm):  # type: ignore[type-arg]  # generic in the stubs alone
    prompt_nanousd_per_token = PriceField(
        label="Prompt price (USD per million tokens)", help_text="Holds for requests that are admitted after you save."
    )
    completion_nanousd_per_token = PriceField(label="Completion price (USD per million tokens)")


@admin.register(Model)
class CatalogAdmin(ModelAdmin):  # type: ignore[misc]
    form = ModelForm
    list_display = ["slug", "name", "kind", "is_enabled", "prompt_price", "completion_price", "version"]
    list_filter = ["kind", "is_enabled"]
    search_fields = ["slug", "name"]
    readonly_fields = ["slug", "kind", "version", "context_tokens", "dimensions", "created_at", "updated_at"]
    fields = [
        "slug",
        "name",
        "description",
        "is_enabled",
        "prompt_nanousd_per_token",
        "completion_nanousd_per_token",
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

    @admin.display(description="prompt, USD per million", ordering="prompt_nanousd_per_token")
    def prompt_price(self, model: Model) -> str:
        return _per_million(model.prompt_nanousd_per_token)

    @admin.display(description="completion, USD per million", ordering="completion_nanousd_per_token")
    def completion_price(self, model: Model) -> str:
        return _per_million(model.completion_nanousd_per_token)


def _per_million(nanousd_per_token: int) -> str:
    return f"{Decimal(nanousd_per_token) / NANOUSD_PER_TOKEN_OF_USD_PER_MILLION:.3f}"
