"""Show people, organizations, plans and keys. Nothing here shows a key or its digest."""

from typing import Any

from allauth.account.models import EmailAddress
from django import forms
from django.contrib import admin, messages
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group, Permission
from django.db.models import QuerySet
from django.forms.fields import InvalidJSONInput
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html
from unfold.admin import ModelAdmin
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from aiscale.autocompletes import Autocompletes
from aiscale.db import format_usd
from aiscale.money_forms import UsdField
from apps.accounts import audit
from apps.accounts.audit_admin import Audited
from apps.accounts.keys import revoke_key
from apps.accounts.membership_admin import InvitationInline, MembershipInline, RecordsMembers
from apps.accounts.models import ApiKey, Organization, Plan, User
from apps.accounts.organizations import ensure_personal_organization
from apps.accounts.plans import say_rate

MODEL_NAME_CHARS = 128

admin.site.unregister([Group, EmailAddress])


@admin.register(Permission)
class PermissionAdmin(ModelAdmin):  # type: ignore[misc]
    """Let permissions be found by name where a user's are chosen; it is on no list."""

    search_fields = ["name", "codename", "content_type__app_label"]
    ordering = ["content_type__app_label", "content_type__model", "codename"]

    def has_module_permission(self, request: HttpRequest) -> bool:
        return False

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Permission | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Permission | None = None) -> bool:
        return False


class CreationForm(UserCreationForm):  # type: ignore[misc]
    class Meta:
        model = User
        fields = ("email",)


@admin.register(User)
class UserAdmin(RecordsMembers, Audited, Autocompletes, DjangoUserAdmin, ModelAdmin):  # type: ignore[misc,type-arg]
    audit_as = "user"
    form = UserChangeForm
    add_form = CreationForm
    change_password_form = AdminPasswordChangeForm
    ordering = ["email"]
    list_display = ["email", "public_id", "is_active", "is_staff", "date_joined", "last_login"]
    list_filter = ["is_active", "is_staff", "is_superuser"]
    search_fields = ["email", "=public_id", "first_name", "last_name"]
    readonly_fields = ["public_id", "password_page", "last_login", "date_joined"]
    filter_horizontal = ()
    autocomplete_fields = ["user_permissions"]
    fieldsets = [
        (None, {"fields": ["email", "public_id", "password_page"]}),
        ("Person", {"fields": ["first_name", "last_name", "date_joined", "last_login"]}),
        ("Rights", {"fields": ["is_active", "is_staff", "is_superuser", "user_permissions"]}),
    ]
    add_fieldsets = [(None, {"classes": ["wide"], "fields": ["email", "password1", "password2"]})]
    inlines = [MembershipInline]

    def save_model(self, request: HttpRequest, obj: User, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        ensure_personal_organization(obj)

    @admin.display(description="password")
    def password_page(self, user: User) -> str:
        return format_html(
            '<a href="{}">Set another one</a>', reverse("admin:auth_user_password_change", args=[user.pk])
        )

    def get_readonly_fields(self, request: HttpRequest, obj: User | None = None) -> list[str]:
        # who takes their own rights away, by a slip, could leave nobody who gives them back
        own = ["is_active", "is_staff", "is_superuser"] if obj is not None and obj == request.user else []
        return [*super().get_readonly_fields(request, obj), *own]

    def get_fieldsets(self, request: HttpRequest, obj: User | None = None) -> Any:
        if obj is None or self.has_change_permission(request, obj):
            return super().get_fieldsets(request, obj)
        (name, first), *rest = self.fieldsets
        return [(name, {"fields": [field for field in first["fields"] if field != "password_page"]}), *rest]

    def has_delete_permission(self, request: HttpRequest, obj: User | None = None) -> bool:
        """A person is shut out by ``is_active``: their usage, and their keys at the gate, must stay known."""
        return False

    def get_inlines(self, request: HttpRequest, obj: User | None) -> list[Any]:
        return [MembershipInline] if obj else []


@admin.register(Organization)
class OrganizationAdmin(RecordsMembers, Audited, ModelAdmin):  # type: ignore[misc]
    audit_as = "organization"
    list_display = ["name", "public_id", "plan", "is_active", "created_at"]
    list_filter = ["plan", "is_active"]
    search_fields = ["name", "=public_id", "memberships__user__email"]
    readonly_fields = ["public_id", "personal_of", "created_at", "updated_at"]
    fields = [
        "name",
        "public_id",
        "plan",
        "is_active",
        "semantic_cache",
        "semantic_max_error_percent",
        "personal_of",
        "created_at",
        "updated_at",
    ]
    list_select_related = ["plan"]
    inlines = [MembershipInline, InvitationInline]

    def audited_organization_id(self, obj: Organization) -> str:
        return obj.public_id

    def has_delete_permission(self, request: HttpRequest, obj: Organization | None = None) -> bool:
        """An organization is suspended: its ledger, and its keys at the gate, must stay known."""
        return False


def check_model_names(names: Any) -> list[str]:
    """Raise: ValidationError for what is no list of model names. The gate's mirror joins them with commas."""
    if not isinstance(names, list) or not all(_can_be_model(name) for name in names):
        raise forms.ValidationError('Write a list of model names, such as ["smollm2-135m-instruct"], or [] for all.')
    return names


def _can_be_model(name: Any) -> bool:
    # what cannot be printed, such as a NUL or half of a surrogate pair, Postgres cannot keep
    return isinstance(name, str) and 0 < len(name) <= MODEL_NAME_CHARS and name.isprintable() and "," not in name


class ModelNamesField(forms.JSONField):
    """Take a list of model names; what is none is shown again as it was written."""

    def to_python(self, value: Any) -> Any:
        # nothing is no list either: emptied by a slip, it would allow all models
        return check_model_names(super().to_python(value))

    def bound_data(self, data: Any, initial: Any) -> Any:
        try:
            self.to_python(data)
        except forms.ValidationError:
            return InvalidJSONInput(data or "")
        return super().bound_data(data, initial)


class PlanForm(forms.ModelForm):  # type: ignore[type-arg]  # generic in the stubs alone
    monthly_limit_nanousd = UsdField(
        label="Monthly spend limit (USD)",
        help_text="Nobody on this plan spends more in a month, unless an organization has a budget of its own.",
    )
    monthly_included_nanousd = UsdField(
        label="Monthly included spend (USD)", required=False, help_text="What the plan's price pays for."
    )
    monthly_price_nanousd = UsdField(label="Price a month (USD)", required=False)

    class Meta:
        model = Plan
        exclude = ["public_id"]
        field_classes = {"allowed_models": ModelNamesField}

    def clean_monthly_included_nanousd(self) -> int:
        return self.cleaned_data["monthly_included_nanousd"] or 0

    def clean_monthly_price_nanousd(self) -> int:
        return self.cleaned_data["monthly_price_nanousd"] or 0


class ApiKeyForm(forms.ModelForm):  # type: ignore[type-arg]  # generic in the stubs alone
    class Meta:
        model = ApiKey
        fields = "__all__"
        field_classes = {"allowed_models": ModelNamesField}


@admin.register(Plan)
class PlanAdmin(Audited, ModelAdmin):  # type: ignore[misc]
    audit_as = "plan"
    form = PlanForm
    list_display = ["name", "slug", "requests", "tokens", "max_in_flight", "monthly_limit", "priority"]
    ordering = ["monthly_limit_nanousd"]
    fieldsets = [
        (None, {"fields": ["name", "slug"]}),
        ("Rate", {"fields": ["requests_per_window", "window_s", "tokens_per_minute", "max_in_flight"]}),
        ("Money", {"fields": ["monthly_limit_nanousd", "monthly_included_nanousd", "monthly_price_nanousd"]}),
        ("Models and size", {"fields": ["allowed_models", "context_tokens", "max_output_tokens"]}),
        ("Cached answers", {"fields": ["cache_scope", "cached_price_percent"]}),
        ("Queue", {"fields": ["priority", "weight", "max_queued", "max_wait_s"]}),
        ("Moderation", {"fields": ["moderation"]}),
    ]

    def get_readonly_fields(self, request: HttpRequest, obj: Plan | None = None) -> list[str]:
        # running requests and the mirror know a plan by its slug
        return ["slug"] if obj else []

    def save_model(self, request: HttpRequest, obj: Plan, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        tokens, output = obj.tokens_per_minute, obj.max_output_tokens
        if tokens is not None and tokens <= output:
            messages.warning(
                request,
                f"{tokens:,} tokens a minute have no room for an answer of {output:,}. The chat always asks for the longest answer, so it "
                "refuses everybody on this plan, as the API does whoever sets no max_tokens. Raise tokens a minute, or lower the output.",
            )

    @admin.display(description="requests")
    def requests(self, plan: Plan) -> str:
        return say_rate(plan.requests_per_window, plan.window_s)

    @admin.display(description="tokens a minute", ordering="tokens_per_minute")
    def tokens(self, plan: Plan) -> str:
        return "no limit" if plan.tokens_per_minute is None else f"{plan.tokens_per_minute:,}"

    @admin.display(description="monthly limit", ordering="monthly_limit_nanousd")
    def monthly_limit(self, plan: Plan) -> str:
        return format_usd(plan.monthly_limit_nanousd)


@admin.register(ApiKey)
class ApiKeyAdmin(Audited, ModelAdmin):  # type: ignore[misc]
    audit_as = "key"
    form = ApiKeyForm
    list_display = ["__str__", "ending", "organization", "created_by", "last_used_at", "expires_at", "revoked_at"]
    list_filter = ["revoked_at"]
    search_fields = ["name", "=public_id", "=hint", "organization__name", "created_by__email"]
    list_select_related = ["organization", "created_by"]
    readonly_fields = [
        "public_id",
        "ending",
        "organization",
        "created_by",
        "created_at",
        "last_used_at",
        "revoked_at",
    ]
    fieldsets = [
        (None, {"fields": ["name", *readonly_fields, "expires_at"]}),
        (
            "Limits of this key alone, below its plan's",
            {"fields": ["requests_per_window", "window_s", "tokens_per_minute", "max_in_flight", "allowed_models"]},
        ),
        ("More than that", {"fields": ["can_manage"]}),
    ]
    actions = ["revoke_selected"]

    def audited_organization_id(self, obj: ApiKey) -> str:
        return obj.organization.public_id

    @admin.display(description="ends in")
    def ending(self, key: ApiKey) -> str:
        return f"…{key.hint}"

    @admin.action(description="Revoke the selected keys", permissions=["change"])
    def revoke_selected(self, request: HttpRequest, queryset: QuerySet[ApiKey]) -> None:
        count = 0
        for key in queryset.filter(revoked_at=None).select_related("organization", "created_by"):
            revoke_key(key, audit.by_request(request))
            count += 1
        messages.success(request, f"{count} {'key is' if count == 1 else 'keys are'} revoked and refused from now on.")

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Keys are made where they can be shown once: on the keys page, or by ``create_api_key``."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: ApiKey | None = None) -> bool:
        """A revoked key stays, so that usage can be told apart."""
        return False
