"""Show the audit log, and write it for what is changed in the admin."""

import json
from collections.abc import Iterator
from typing import Any

from django.contrib import admin
from django.db import transaction
from django.db.models import Model
from django.http import HttpRequest
from django.utils.html import format_html, format_html_join
from django.utils.text import capfirst
from unfold.admin import ModelAdmin

from aiscale.db import format_usd
from apps.accounts import audit
from apps.accounts.models import AuditEvent


class Audited:
    """Record what is added, changed and deleted in a model's admin, with the old and the new values.

    Stands before ModelAdmin. ``audit_as`` names the thing: ``plan`` gives ``plan.create``, ``plan.change`` and ``plan.delete`` of
    ``plan:<public id>``.
    The admin saves inside a transaction, so the event is written with the change or not at all.
    """

    audit_as = ""

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)  # type: ignore[misc]
        changed = _list_changes(form)
        if change and not changed:
            return
        audit.record(
            f"{self.audit_as}.{'change' if change else 'create'}",
            target=f"{self.audit_as}:{_name(obj)}",
            by=audit.by_request(request),
            organization_id=self.audited_organization_id(obj),
            details={"name": str(obj), "changed": changed},
        )

    def delete_model(self, request: HttpRequest, obj: Any) -> None:
        target = f"{self.audit_as}:{_name(obj)}"
        was = {field.name: _plain(getattr(obj, field.name)) for field in obj._meta.concrete_fields}
        # one by one, the list's action is in no transaction
        with transaction.atomic():
            audit.record(
                f"{self.audit_as}.delete",
                target=target,
                by=audit.by_request(request),
                organization_id=self.audited_organization_id(obj),
                details={"name": str(obj), "was": was},
            )
            super().delete_model(request, obj)  # type: ignore[misc]

    def audited_organization_id(self, obj: Any) -> str:
        """Return the public id of the organization that ``obj`` belongs to, '' when it belongs to the site."""
        return ""


@admin.register(AuditEvent)
class AuditEventAdmin(ModelAdmin):  # type: ignore[misc]
    list_display = ["at", "actor", "actor_kind", "action", "target", "reason"]
    list_filter = ["actor_kind", ("action", admin.AllValuesFieldListFilter)]
    search_fields = ["=actor", "=actor_id", "=target", "=organization_id", "=public_id", "=address"]
    search_help_text = "The exact name of an actor, target or address, or the id of an organization."
    date_hierarchy = "at"
    ordering = ["-at", "-id"]
    show_full_result_count = False
    fields = ["public_id", "at", "actor", "actor_kind", "actor_id", "address", "action", "target", "organization_id"]
    fields += ["reason", "what"]
    readonly_fields = fields

    @admin.display(description="details")
    def what(self, event: AuditEvent) -> str:
        lines = format_html_join("", "<p>{}: {}</p>", _say_details(event.details))
        return format_html('<div class="detail-lines">{}</div>', lines) if lines else "-"

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: AuditEvent | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: AuditEvent | None = None) -> bool:
        return False


def _list_changes(form: Any) -> dict[str, dict[str, Any]]:
    pairs = {
        name: {"from": _plain(form.initial.get(name)), "to": _plain(form.cleaned_data.get(name))}
        for name in form.changed_data
    }
    return {name: pair for name, pair in pairs.items() if pair["from"] != pair["to"]}


def _say_details(
    details: dict[str, Any], above: tuple[str, ...] = (), is_sum: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield each detail's name and value in words: ``limit_nanousd`` from 1000000000 to None -> ``Limit``, ``$1.00 → none``."""
    for key, value in details.items():
        is_money = is_sum or key.endswith("_nanousd")
        names = (*above, key.removesuffix("_nanousd").replace("_", " "))
        if isinstance(value, dict) and value.keys() == {"from", "to"}:
            yield capfirst(", ".join(names)), f"{_say(value['from'], is_money)} → {_say(value['to'], is_money)}"
        elif isinstance(value, dict) and value:
            yield from _say_details(value, names, is_money)
        else:
            yield capfirst(", ".join(names)), _say(value, is_money)


def _say(value: Any, is_money: bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_say(each, is_money) for each in value) or "none"
    if isinstance(value, int):
        return format_usd(value) if is_money else f"{value:,}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) and value else str(value or "none")


def _plain(value: Any) -> Any:
    return _name(value) if isinstance(value, Model) else value


def _name(obj: Model) -> str:
    return str(getattr(obj, "public_id", "") or obj.pk)
