"""Trip, release and look back on kill switches in the admin, each in two steps: what it does in a sentence, then the act."""

from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import Q, QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.template.response import TemplateResponse
from django.urls import path, reverse
from django.utils import timezone
from django.utils.html import format_html
from unfold.admin import ModelAdmin

from aiscale.errors import AiscaleError
from apps.accounts import audit
from apps.spend import killswitch, reach, scope_names
from apps.spend.kill_forms import ReleaseForm, TripForm
from apps.spend.models import KillSwitch
from apps.spend.refusals import say_moment
from apps.spend.scope_names import NamesScopes


class InForceFilter(admin.SimpleListFilter):
    title = "in force"
    parameter_name = "in_force"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("yes", "Yes"), ("no", "No, released")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        in_force = Q(released_at=None) & (Q(until_at=None) | Q(until_at__gt=timezone.now()))
        return {"yes": queryset.filter(in_force), "no": queryset.exclude(in_force)}.get(self.value() or "", queryset)


class KindFilter(admin.SimpleListFilter):
    title = "kind"
    parameter_name = "kind"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(kind, kind.capitalize()) for kind in killswitch.KINDS]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        kind = self.value()
        return queryset.filter(Q(scope=kind) | Q(scope__startswith=f"{kind}:")) if kind else queryset


@admin.register(KillSwitch)
class KillSwitchAdmin(NamesScopes, ModelAdmin):  # type: ignore[misc]
    list_display = ["scope_name", "in_force", "reason", "until_at", "tripped", "ended"]
    list_filter = [InForceFilter, KindFilter]
    search_fields = ["=scope", "reason", "=tripped_by"]
    search_help_text = "The exact scope (such as model:smollm2-135m-instruct), part of a reason, or who tripped it."
    date_hierarchy = "tripped_at"
    fields = ["public_id", "scope_name", "scope", "in_force", "reason", "until_at", "tripped_by", "tripped_at"]
    fields += ["released_by", "released_at", "release_reason", "what_happened"]
    readonly_fields = [*fields, "release_link"]

    @admin.display(description="in force", boolean=True)
    def in_force(self, switch: KillSwitch) -> bool:
        return switch.is_in_force

    @admin.display(description="tripped", ordering="tripped_at")
    def tripped(self, switch: KillSwitch) -> str:
        return f"{say_moment(switch.tripped_at)} by {switch.tripped_by}"

    @admin.display(description="ended", ordering="released_at")
    def ended(self, switch: KillSwitch) -> str:
        return f"{say_moment(switch.released_at)} by {switch.released_by}" if switch.released_at else ""

    @admin.display(description="audit log")
    def what_happened(self, switch: KillSwitch) -> str:
        url = reverse("admin:accounts_auditevent_changelist", query={"q": switch.scope})
        return format_html('<a href="{}">Everything that happened to {}</a>', url, switch.scope)

    def get_list_display(self, request: HttpRequest) -> list[Any]:
        return [*self.list_display, "release_link"] if self.has_release_permission(request) else self.list_display

    def get_fields(self, request: HttpRequest, obj: KillSwitch | None = None) -> list[Any]:
        is_open = obj is not None and obj.released_at is None and self.has_release_permission(request)
        return ["release_link", *self.fields] if is_open else self.fields

    @admin.display(description="")
    def release_link(self, switch: KillSwitch) -> str:
        if switch.released_at is not None:
            return ""
        return format_html(
            '<a class="font-semibold text-primary-600 dark:text-primary-500" href="{}">Release</a>',
            reverse("admin:spend_killswitch_release", args=[switch.pk]),
        )

    def has_change_permission(self, request: HttpRequest, obj: KillSwitch | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: KillSwitch | None = None) -> bool:
        return False

    def has_release_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("spend.change_killswitch"))

    def get_urls(self) -> list[Any]:
        release = self.admin_site.admin_view(self.release_view)
        return [path("<int:pk>/release/", release, name="spend_killswitch_release"), *super().get_urls()]

    def add_view(self, request: HttpRequest, form_url: str = "", extra_context: Any = None) -> HttpResponse:
        """Ask what to stop, say in sentences what that does, and do it once that is confirmed."""
        if not self.has_add_permission(request):
            raise PermissionDenied
        initial = {name: request.GET.get(name, "") for name in ("kind", "target")}
        form = TripForm(request.POST or None, initial=initial)
        if request.method != "POST" or not form.is_valid():
            return self._show(request, "trip", {"title": "Stop requests", "form": form})
        if "confirm" in request.POST:
            return self._trip(request, form)
        cleaned = form.cleaned_data
        sentences = reach.describe_trip(cleaned["scope"], cleaned["reason"], cleaned["until_at"])
        confirmed = form.list_confirmed()
        return self._show(request, "trip", {"title": "Stop requests?", "sentences": sentences, "confirmed": confirmed})

    def release_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        """Say in sentences what releasing does, ask why, and do it."""
        if not self.has_release_permission(request):
            raise PermissionDenied
        switch = KillSwitch.objects.filter(pk=pk, released_at=None).first()
        if switch is None:
            if not KillSwitch.objects.filter(pk=pk).exists():
                raise Http404
            messages.info(request, "This kill switch is released already.")
            return redirect("admin:spend_killswitch_changelist")
        form = ReleaseForm(request.POST or None)
        if request.method == "POST" and form.is_valid():
            try:
                killswitch.release(switch.scope, by=audit.by_request(request), reason=form.cleaned_data["reason"])
            except AiscaleError as error:
                messages.warning(request, error.message)
            else:
                messages.success(request, f"{scope_names.name_one(switch.scope)} works again.")
            return redirect("admin:spend_killswitch_changelist")
        context = {
            "title": f"Release {scope_names.name_one(switch.scope)}?",
            "form": form,
            "sentences": reach.describe_release(switch),
        }
        return self._show(request, "release", context)

    def _show(self, request: HttpRequest, name: str, context: dict[str, Any]) -> HttpResponse:
        context = {**self.admin_site.each_context(request), "opts": self.opts, **context}
        return TemplateResponse(request, f"admin/spend/killswitch/{name}.html", context)

    def _trip(self, request: HttpRequest, form: TripForm) -> HttpResponse:
        cleaned = form.cleaned_data
        try:
            killswitch.trip(
                cleaned["scope"], reason=cleaned["reason"], by=audit.by_request(request), until_at=cleaned["until_at"]
            )
        except AiscaleError as error:
            messages.error(request, error.message)
        else:
            messages.success(request, f"{scope_names.name_one(cleaned['scope'])} is stopped. Release it in this list.")
        return redirect("admin:spend_killswitch_changelist")
