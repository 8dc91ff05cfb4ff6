"""Show a model's versions in the admin; start a canary, promote one, roll back."""

from collections.abc import Callable
from functools import partial
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.db.models import OuterRef, QuerySet, Subquery, Sum
from django.http import HttpRequest
from unfold.admin import ModelAdmin
from unfold.widgets import UnfoldAdminIntegerFieldWidget

from aiscale.errors import AiscaleError
from apps.accounts import audit
from apps.inference import traffic
from apps.inference.models import Model, ModelVersion


class WeightForm(forms.ModelForm):  # type: ignore[type-arg]  # generic in the stubs alone
    weight = forms.IntegerField(
        label="of 100 requests",
        min_value=0,
        max_value=traffic.MOST_WEIGHT,
        widget=UnfoldAdminIntegerFieldWidget,
        help_text="Beside the main version, which gets the rest. 0 ends it. It begins when every worker of the model has loaded it.",
    )

    class Meta:
        model = ModelVersion
        fields = ["weight"]

    def clean_weight(self) -> int:
        weight = int(self.cleaned_data["weight"])
        try:
            traffic.check_weight(self.instance.model, self.instance, weight)
        except AiscaleError as error:
            raise forms.ValidationError(error.message) from error
        return weight


@admin.register(ModelVersion)
class VersionAdmin(ModelAdmin):  # type: ignore[misc]
    form = WeightForm
    list_display = [
        "model",
        "version",
        "state",
        "share",
        "health",
        "precision",
        "is_invariant",
        "megabytes",
        "created_at",
    ]
    list_filter = ["model", "precision"]
    list_select_related = ["model"]
    actions = ["promote", "roll_back"]
    readonly_fields = [
        "model",
        "version",
        "state",
        "health",
        "precision",
        "is_invariant",
        "takes_chats",
        "context_tokens",
    ]
    readonly_fields += [
        "megabytes",
        "source",
        "license",
        "canary_since",
        "rolled_back_at",
        "rolled_back_because",
        "created_at",
    ]
    fields = ["model", "version", "state", "weight", *readonly_fields[3:]]

    def get_queryset(self, request: HttpRequest) -> QuerySet[ModelVersion]:
        queryset: QuerySet[ModelVersion] = super().get_queryset(request)
        of_model = ModelVersion.objects.filter(model=OuterRef("model")).order_by().values("model")
        return queryset.annotate(all_weights=Subquery(of_model.annotate(sum=Sum("weight")).values("sum")))

    def has_add_permission(self, request: HttpRequest) -> bool:
        """They enter with their files, through ``import_model`` and ``seed_catalog``."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: ModelVersion | None = None) -> bool:
        return False

    def save_model(self, request: HttpRequest, obj: ModelVersion, form: Any, change: bool) -> None:
        if "weight" not in form.cleaned_data:
            return
        by, wanted = audit.by_request(request), int(form.cleaned_data["weight"])
        self._try(
            request, lambda: traffic.set_weight(obj.model.slug, obj.version, wanted, by=by, reason="Set in the admin")
        )

    @admin.action(description="Make it the main version", permissions=["change"])
    def promote(self, request: HttpRequest, queryset: QuerySet[ModelVersion]) -> None:
        by = audit.by_request(request)
        for row in queryset.select_related("model"):
            act = partial(traffic.promote, row.model.slug, row.version, by=by, reason="In the admin")
            if self._try(request, act):
                self.message_user(request, f"{row.version} is the main version of {row.model.slug}.")

    @admin.action(
        description="Roll the model back: end its canary, or return to the version before", permissions=["change"]
    )
    def roll_back(self, request: HttpRequest, queryset: QuerySet[ModelVersion]) -> None:
        by = audit.by_request(request)
        for slug in sorted({row.model.slug for row in queryset.select_related("model")}):
            done = self._try(request, partial(traffic.roll_back, slug, by=by, reason="Rolled back in the admin"))
            if done:
                self.message_user(request, f"{slug}: {done}.")

    def _try(self, request: HttpRequest, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except AiscaleError as error:
            self.message_user(request, error.message, messages.ERROR)
            return None

    def get_readonly_fields(self, request: HttpRequest, obj: ModelVersion | None = None) -> list[str]:
        fixed = obj is not None and (obj.version == obj.model.version or obj.model.kind != Model.Kind.GENERATE)
        return [*self.readonly_fields, "share", *(["weight"] if fixed else [])]

    def get_fields(self, request: HttpRequest, obj: ModelVersion | None = None) -> list[str]:
        fixed = "weight" in self.get_readonly_fields(request, obj)
        return ["share" if name == "weight" and fixed else name for name in self.fields]

    @admin.display(description="of 100 requests")
    def share(self, row: Any) -> int:
        return int(row.weight if row.version != row.model.version else 100 - row.all_weights)

    @admin.display(description="batch-invariant", boolean=True)
    def is_invariant(self, row: ModelVersion) -> bool | None:
        return row.batch_invariant if row.model.kind == Model.Kind.GENERATE else None

    @admin.display(description="state")
    def state(self, row: ModelVersion) -> str:
        if row.version == row.model.version:
            return "main"
        if row.weight:
            return "canary"
        return "rolled back" if row.rolled_back_at else "no requests"

    @admin.display(description="as a canary")
    def health(self, row: ModelVersion) -> str:
        return str(traffic.measure(row)) if row.canary_since else ""

    @admin.display(description="MB", ordering="size_bytes")
    def megabytes(self, row: ModelVersion) -> str:
        return f"{row.size_bytes / 1e6:.0f}"
