"""Name whom scopes cover, for lists of the admin: ids are read by programs, names by people."""

from collections.abc import Iterable
from typing import Any

from django.contrib import admin
from django.http import HttpRequest

from apps.accounts.models import ApiKey, Organization, Plan, User

_KINDS: dict[str, tuple[str, Any, str]] = {
    "organization": ("Organization", Organization, "public_id"),
    "user": ("User", User, "public_id"),
    "key": ("API key", ApiKey, "public_id"),
    "plan": ("Plan", Plan, "slug"),
}


def name_all(scopes: Iterable[str]) -> dict[str, str]:
    """Return each scope's name; who is not there any more keeps the id. I/O: one SQL statement for each kind of scope."""
    names: dict[str, str] = {}
    ids: dict[str, set[str]] = {}
    for scope in scopes:
        kind, _, name = scope.partition(":")
        names[scope] = f"{kind.capitalize()} {name}" if name else "The whole service"
        ids.setdefault(kind, set()).add(name)
    for kind in _KINDS.keys() & ids.keys():
        word, model, field = _KINDS[kind]
        rows = model.objects.filter(**{f"{field}__in": ids[kind]})
        for row in rows.select_related("organization") if model is ApiKey else rows:
            names[f"{kind}:{getattr(row, field)}"] = f"{word} {_name(row)}"
    return names


def name_one(scope: str) -> str:
    """Return a scope's name. I/O: up to one SQL statement."""
    return name_all([scope])[scope]


def attach(rows: Iterable[Any]) -> list[Any]:
    """Give each row the name of its ``scope`` as ``scope_name``. I/O: as `name_all`."""
    found = list(rows)
    names = name_all(row.scope for row in found)
    for row in found:
        row.scope_name = names[row.scope]
    return found


def _name(row: Any) -> str:
    return f"{row} of {row.organization}" if isinstance(row, ApiKey) else str(row)


class NamesScopes:
    """Show the name of a row's ``scope`` as ``scope_name``. Stands before ModelAdmin."""

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        changelist = super().get_changelist_instance(request)  # type: ignore[misc]
        # all names of a page at once, not one statement for each row
        attach(changelist.result_list)
        return changelist

    @admin.display(description="for", ordering="scope")
    def scope_name(self, row: Any) -> str:
        return str(getattr(row, "scope_name", None) or name_one(row.scope))


def map_organizations(public_ids: Iterable[str]) -> dict[str, str]:
    """Return each organization's name; who is not there any more is missing. I/O: one SQL statement."""
    return dict(Organization.objects.filter(public_id__in=set(public_ids)).values_list("public_id", "name"))


class NamesOrganizations:
    """Show the name of the one that a row's ``organization_id`` means as ``organization``. Stands before ModelAdmin."""

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        changelist = super().get_changelist_instance(request)  # type: ignore[misc]
        names = map_organizations(row.organization_id for row in changelist.result_list)
        for row in changelist.result_list:
            row.organization_name = names.get(row.organization_id, row.organization_id)
        return changelist

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return ["organization", *super().get_readonly_fields(request, obj)]  # type: ignore[misc]

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        rest = super().get_fields(request, obj)  # type: ignore[misc]
        return ["organization", *(name for name in rest if name != "organization")]

    @admin.display(description="organization", ordering="organization_id", empty_value="unknown")
    def organization(self, row: Any) -> str:
        public_id = row.organization_id
        return str(getattr(row, "organization_name", None) or map_organizations([public_id]).get(public_id, public_id))
