"""Let an owner name, price, enable and disable models."""

from typing import Any, ClassVar
from urllib.parse import urlsplit

from django import forms
from django.contrib import admin
from django.db.models import OuterRef, QuerySet, Subquery
from django.db.models.functions import Now
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html
from unfold.admin import ModelAdmin
from unfold.widgets import UnfoldAdminPasswordWidget, UnfoldAdminTextInputWidget

from aiscale.money_forms import format_per_million
from apps.accounts import audit
from apps.inference import purge_admin, version_admin  # noqa: F401  # register their pages
from apps.inference.cache import generations
from apps.inference.models import Model, ModerationFlag, Upstream
from apps.inference.upstream_client import is_allowed
from apps.spend.models import Price
from apps.spend.scope_names import NamesOrganizations


class UpstreamForm(forms.ModelForm):  # type: ignore[type-arg]  # generic in the stubs alone
    base_url = forms.URLField(
        label="Base URL",
        max_length=300,
        assume_scheme="https",
        help_text="Up to and with /v1.",
        widget=UnfoldAdminTextInputWidget,
    )
    key = forms.CharField(
        required=False,
        widget=UnfoldAdminPasswordWidget(attrs={"autocomplete": "new-password"}),
        help_text="Kept sealed and never shown. Leave it empty to keep the one that is there.",
    )

    class Meta:
        model = Upstream
        fields = ["name", "base_url", "is_enabled", "timeout_s", "retries"]
        # a page would take <name> for markup
        help_texts: ClassVar = {"name": "Kill switches name it: provider:NAME."}

    def clean_base_url(self) -> str:
        """Refuse what the server would refuse to ask."""
        url = str(self.cleaned_data["base_url"]).rstrip("/")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.username or parts.query or parts.fragment:
            raise forms.ValidationError("Write http(s)://host/path, without a user, query or fragment.")
        host = parts.hostname or ""
        try:
            is_private = not is_allowed(host)
        except ValueError:
            # a name: looked up, and checked, at each request
            is_private = host == "localhost" and not is_allowed("127.0.0.1")
        if is_private:
            raise forms.ValidationError("This address is private; AISCALE_UPSTREAMS_PRIVATE=1 allows such ones.")
        return url

    def save(self, commit: bool = True) -> Any:
        if self.cleaned_data["key"]:
            self.instance.set_key(self.cleaned_data["key"])
        return super().save(commit)


@admin.register(Upstream)
class UpstreamAdmin(ModelAdmin):  # type: ignore[misc]
    form = UpstreamForm
    list_display = ["name", "base_url", "is_enabled", "has_key", "timeout_s", "retries"]
    fields = ["name", "base_url", "key", "is_enabled", "timeout_s", "retries"]

    @admin.display(description="key", boolean=True)
    def has_key(self, upstream: Upstream) -> bool:
        return bool(upstream.sealed_key)


@admin.register(Model)
class CatalogAdmin(ModelAdmin):  # type: ignore[misc]
    list_display = ["slug", "name", "kind", "is_enabled", "prompt_price", "completion_price", "version"]
    list_filter = ["kind", "is_enabled"]
    search_fields = ["slug", "name"]
    readonly_fields = ["prompt_price", "completion_price", "change_price", "list_prices", "slug", "kind", "version"]
    readonly_fields += ["context_tokens", "dimensions", "created_at", "updated_at"]
    fields = [
        "slug",
        "name",
        "description",
        "is_enabled",
        "prompt_price",
        "completion_price",
        "change_price",
        "list_prices",
        "kind",
        "version",
        "context_tokens",
        "dimensions",
        "created_at",
        "updated_at",
    ]

    actions: ClassVar = ["forget_answers"]

    @admin.action(description="Forget the known answers of these models", permissions=["change"])
    def forget_answers(self, request: HttpRequest, queryset: QuerySet[Model]) -> None:
        """Empty the answer cache of each of them, at all levels."""
        rows = sum(generations.purge(f"model:{model.slug}", by=audit.by_request(request)) for model in queryset)
        self.message_user(request, f"Their known answers are forgotten ({rows} of them were kept in Postgres).")

    def get_fields(self, request: HttpRequest, obj: Model | None = None) -> list[str]:
        """A model with files enters through ``seed_catalog``; one of an upstream is added here."""
        if obj is None:
            return ["slug", "name", "description", "kind", "upstream", "upstream_model", "context_tokens", "dimensions"]
        more = ["upstream", "upstream_model"] if obj.upstream_id else ["fallback"]
        # where the links lead, not everybody may go
        wants = {"change_price": "spend.add_price", "list_prices": "spend.view_price"}
        fields = [name for name in self.fields if name not in wants or request.user.has_perm(wants[name])]
        return [*fields[:4], *more, *fields[4:]]

    def get_readonly_fields(self, request: HttpRequest, obj: Model | None = None) -> list[str]:
        if obj is None:
            return []
        return [name for name in self.readonly_fields if not (obj.upstream_id and name == "context_tokens")]

    def get_form(self, request: HttpRequest, obj: Model | None = None, change: bool = False, **kwargs: Any) -> Any:
        form = super().get_form(request, obj, change, **kwargs)
        if (obj is None or obj.upstream_id) and "upstream" in form.base_fields:
            if "kind" in form.base_fields:
                form.base_fields["kind"].choices = [
                    (kind.value, kind.label) for kind in (Model.Kind.GENERATE, Model.Kind.EMBED)
                ]
                form.base_fields["kind"].initial = Model.Kind.GENERATE
                form.base_fields["dimensions"].help_text = "Of embeddings; 0: whatever the upstream makes."
            form.base_fields["upstream"].required = form.base_fields["upstream_model"].required = True
        return form

    def save_model(self, request: HttpRequest, obj: Model, form: Any, change: bool) -> None:
        if not change:
            obj.version = "upstream"
        super().save_model(request, obj, form, change)

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

    @admin.display(description="another price")
    def change_price(self, model: Model) -> str:
        return format_html('<a href="{}?model={}">Change the price</a>', reverse("admin:spend_price_add"), model.slug)

    @admin.display(description="all prices")
    def list_prices(self, model: Model) -> str:
        url = reverse("admin:spend_price_changelist")
        return format_html('<a href="{}?model={}">Look at all of them</a>', url, model.slug)


def _word(nanousd_per_token: int | None) -> str:
    return "none: not served" if nanousd_per_token is None else format_per_million(nanousd_per_token)


@admin.register(ModerationFlag)
class ModerationFlagAdmin(NamesOrganizations, ModelAdmin):  # type: ignore[misc]
    """Show what was flagged, and let nobody change it."""

    list_display = ["created_at", "action", "flagged_for", "source", "organization", "request_id"]
    list_filter = ["action", "source", "created_at"]
    search_fields = ["=organization_id", "=user_id", "=request_id"]
    search_help_text = "The exact id of an organization, a user or a request."
    ordering = ["-created_at"]
    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: ModerationFlag | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: ModerationFlag | None = None) -> bool:
        return False

    @admin.display(description="for")
    def flagged_for(self, flag: ModerationFlag) -> str:
        return ", ".join(label.replace("_", " ") for label in flag.labels)
