"""Forget known answers in the admin: everybody's, one model's or one organization's; and see when that was done."""

from typing import Any

from django import forms
from django.contrib import admin
from django.http import HttpRequest
from unfold.admin import ModelAdmin
from unfold.widgets import UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget

from apps.accounts import audit
from apps.inference.cache import generations
from apps.inference.models import CacheGeneration, Model
from apps.spend.kill_forms import find_organization


class PurgeForm(forms.ModelForm):  # type: ignore[type-arg]  # generic in the stubs alone
    """``cleaned_data`` holds the ``scope`` and the ``reason``."""

    KINDS = (("organization", "One organization"), ("model", "One model"), ("site", "Everybody's"))

    kind = forms.ChoiceField(label="Forget the known answers of", choices=KINDS, widget=UnfoldAdminSelectWidget)
    target = forms.CharField(
        label="Which one",
        required=False,
        max_length=128,
        help_text="An organization's id (org_...) or name, or the e-mail address of its owner; or the model's short name. "
        "Empty for everybody's.",
        widget=UnfoldAdminTextInputWidget,
    )
    reason = forms.CharField(
        label="Reason", max_length=300, help_text="For the audit log.", widget=UnfoldAdminTextInputWidget
    )

    class Meta:
        model = CacheGeneration
        fields: tuple[str, ...] = ()

    def clean(self) -> dict[str, Any]:
        cleaned: dict[str, Any] = super().clean() or self.cleaned_data
        kind, target = cleaned.get("kind"), (cleaned.get("target") or "").strip()
        if kind == "site":
            if target:
                self.add_error("target", "Leave this empty to forget everybody's, or choose what this names.")
            cleaned["scope"] = "site"
            return cleaned
        name = find_organization(target) if kind == "organization" and target else target
        if not target:
            self.add_error("target", "Say which one.")
        elif kind == "model" and not Model.objects.filter(slug=target).exists():
            self.add_error("target", f"There is no model {target!r}.")
        elif kind == "organization" and not name.startswith("org_"):
            self.add_error("target", f"There is no organization {target!r}.")
        cleaned["scope"] = f"{kind}:{name}"
        return cleaned


@admin.register(CacheGeneration)
class CacheGenerationAdmin(ModelAdmin):  # type: ignore[misc]
    list_display = ["scope", "number", "purged_at"]
    search_fields = ["=scope"]
    search_help_text = "The exact scope, such as organization:org_... or model:smollm2-135m-instruct."
    form = PurgeForm
    fields = ["kind", "target", "reason"]
    ordering = ["-purged_at"]

    def has_change_permission(self, request: HttpRequest, obj: CacheGeneration | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: CacheGeneration | None = None) -> bool:
        return False

    def save_model(self, request: HttpRequest, obj: CacheGeneration, form: Any, change: bool) -> None:
        """Forget them at all levels, at once."""
        scope = form.cleaned_data["scope"]
        generations.purge(scope, by=audit.by_request(request), reason=form.cleaned_data["reason"])
        kept = CacheGeneration.objects.get(scope=scope)
        obj.pk, obj.scope, obj.number, obj.purged_at = kept.pk, kept.scope, kept.number, kept.purged_at
