"""Show members and invitations in the admin, with the rules and the audit log of the pages."""

from typing import Any

from django import forms
from django.http import HttpRequest
from unfold.admin import TabularInline

from aiscale.autocompletes import Autocompletes
from apps.accounts import audit, roles
from apps.accounts.keys import revoke_keys
from apps.accounts.models import ApiKey, Invitation, Membership, User
from apps.accounts.roles import Right, Role

NEW_ROWS = 20
"""So many members may be added at once; Django would build two thousand rows, each with its searches, and take a minute."""


class MembershipFormSet(forms.BaseInlineFormSet):  # type: ignore[type-arg]  # generic in the stubs alone
    """Refuse what would leave an organization without an owner, with a sentence (the database refuses it in any case)."""

    def clean(self) -> None:
        super().clean()
        rows = [form for form in self.forms if hasattr(form, "cleaned_data")]
        here = Membership.objects.in_bulk([form.instance.pk for form in rows if form.instance.pk])
        kept = [form for form in rows if form.cleaned_data and not form.cleaned_data.get("DELETE")]
        for organization_id in {place.organization_id for place in here.values() if place.role == Role.OWNER}:
            stays = any(
                form.cleaned_data.get("role") == Role.OWNER and form.instance.organization_id == organization_id
                for form in kept
            )
            others = Membership.objects.filter(organization=organization_id, role=Role.OWNER).exclude(pk__in=here)
            if not stays and not others.exists():
                raise forms.ValidationError("An organization needs an owner: make somebody else one first.")


class _Bounded:
    """Build as many rows as there are, and a few new ones, whatever number a browser sends. Stands before TabularInline."""

    model: Any

    def get_formset(self, request: HttpRequest, obj: Any = None, **kwargs: Any) -> Any:
        field = "user" if isinstance(obj, User) else "organization"
        most = NEW_ROWS + (self.model.objects.filter(**{field: obj}).count() if obj is not None else 0)
        wanted = self.get_max_num(request, obj)  # type: ignore[attr-defined]
        new = most if wanted is None else min(wanted, most)
        return super().get_formset(request, obj, max_num=new, absolute_max=most, **kwargs)  # type: ignore[misc]


class MembershipInline(_Bounded, Autocompletes, TabularInline):  # type: ignore[misc]
    model = Membership
    formset = MembershipFormSet
    extra = 0
    fields = ["user", "organization", "role"]
    autocomplete_fields = ["user", "organization"]

    def formfield_for_dbfield(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> Any:
        field = super().formfield_for_dbfield(db_field, request, **kwargs)
        if db_field.name == "role":
            # the column's head names it for the eye alone
            field.widget.attrs["aria-label"] = "Role"
        return field


class InvitationInline(_Bounded, TabularInline):  # type: ignore[misc]
    model = Invitation
    extra = 0
    fields = ["email", "role", "state", "expires_at", "invited_by"]
    readonly_fields = fields
    can_delete = False
    verbose_name_plural = "invitations"

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Members invite, on their page: the mail names them."""
        return False


class RecordsMembers:
    """Do for members that are changed in the admin what the pages do: end keys, and write it down. Stands before ModelAdmin."""

    def save_formset(self, request: HttpRequest, form: Any, formset: Any, change: bool) -> None:
        if formset.model is not Membership:
            super().save_formset(request, form, formset, change)  # type: ignore[misc]
            return
        before = {row.pk: row.role for row in Membership.objects.filter(pk__in=[f.instance.pk for f in formset.forms])}
        super().save_formset(request, form, formset, change)  # type: ignore[misc]
        by = audit.by_request(request)
        for place in formset.deleted_objects:
            _note("member.remove", place, by, {"role": place.role})
            revoke_keys(_keys_of(place), by, reason="Its maker is no member any more.")
        for place in formset.new_objects:
            _note("member.add", place, by, {"role": place.role})
        for place, _ in formset.changed_objects:
            _note("member.role", place, by, {"before": before.get(place.pk), "after": place.role})
            if not roles.may(place.role, Right.MAKE_OWN_KEYS):
                revoke_keys(_keys_of(place), by, reason=f"Its maker's role is {place.role} now.")


def _keys_of(place: Membership) -> Any:
    return ApiKey.objects.filter(organization_id=place.organization_id, created_by_id=place.user_id)


def _note(action: str, place: Membership, by: audit.Actor, details: dict[str, Any]) -> None:
    audit.record(
        action,
        target=f"user:{place.user.public_id}",
        by=by,
        organization_id=place.organization.public_id,
        details={"email": place.user.email, **details},
    )
