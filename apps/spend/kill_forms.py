"""Ask what to stop, why and until when."""

from datetime import datetime
from typing import Any

from django import forms
from django.db.models import Q
from unfold.widgets import UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget

from aiscale.errors import AiscaleError
from apps.accounts.models import Organization
from apps.spend import killswitch

AT = "at"


class TripForm(forms.Form):
    """``cleaned_data`` holds the checked ``scope``, ``reason`` and ``until_at`` (None: until it is released)."""

    KINDS = (
        ("site", "Everything"),
        ("model", "One model"),
        ("plan", "One plan"),
        ("organization", "One organization"),
        ("key", "One API key"),
        ("provider", "One provider"),
    )
    LENGTHS = (
        ("", "Until somebody releases it"),
        ("15m", "For 15 minutes"),
        ("1h", "For an hour"),
        ("4h", "For four hours"),
        ("1d", "For a day"),
        (AT, "Until the time below"),
    )

    kind = forms.ChoiceField(label="Stop", choices=KINDS, widget=UnfoldAdminSelectWidget(attrs={"autofocus": True}))
    target = forms.CharField(
        label="Which one",
        required=False,
        max_length=128,
        help_text="The model's or plan's short name; an organization's id (org_...) or name, or the e-mail address of its owner; "
        "a key's id (key_...); or the provider (local is what your own workers compute). Empty for everything.",
        widget=UnfoldAdminTextInputWidget,
    )
    reason = forms.CharField(
        label="Reason",
        max_length=300,
        help_text="Everybody whose request is stopped reads this sentence.",
        widget=UnfoldAdminTextInputWidget,
    )
    length = forms.ChoiceField(label="How long", choices=LENGTHS, required=False, widget=UnfoldAdminSelectWidget)
    until = forms.CharField(
        label="Until (UTC)",
        required=False,
        max_length=40,
        help_text="Such as 2026-03-01 14:30. It then ends by itself at that moment.",
        widget=UnfoldAdminTextInputWidget,
    )

    def clean(self) -> dict[str, Any]:
        cleaned: dict[str, Any] = super().clean() or self.cleaned_data
        cleaned["scope"], cleaned["until_at"] = self._clean_scope(cleaned), self._clean_end(cleaned)
        if "reason" in cleaned:
            self._check("reason", lambda: killswitch.check_reason(cleaned["reason"]))
        return cleaned

    def _clean_scope(self, cleaned: dict[str, Any]) -> str:
        kind, target = cleaned.get("kind"), (cleaned.get("target") or "").strip()
        if not kind:
            return ""
        if kind == "site":
            if target:
                self.add_error("target", "Leave this empty to stop everything, or choose what this names.")
            return "site"
        if not target:
            self.add_error("target", "Say which one.")
            return ""
        scope = f"{kind}:{find_organization(target) if kind == 'organization' else target}"
        self._check("target", lambda: killswitch.check_scope(scope))
        return scope

    def _clean_end(self, cleaned: dict[str, Any]) -> datetime | None:
        length, text = cleaned.get("length") or "", cleaned.get("until") or ""
        if length != AT:
            if text:
                self.add_error("length", "Choose “Until the time below”, or leave the time empty.")
            return killswitch.parse_end(length) if length else None
        try:
            until_at = killswitch.parse_end(text)
            killswitch.check_end(until_at)
        except AiscaleError as error:
            self.add_error("until", error.message)
            return None
        return until_at

    def _check(self, field: str, check: Any) -> None:
        try:
            check()
        except AiscaleError as error:
            self.add_error(field, error.message)

    def list_confirmed(self) -> dict[str, str]:
        """Return what the confirmation posts: the same order, its end as a fixed time."""
        until_at = self.cleaned_data["until_at"]
        kind, _, target = self.cleaned_data["scope"].partition(":")
        return {
            "kind": kind,
            "target": target,
            "reason": self.cleaned_data["reason"],
            "length": AT if until_at else "",
            "until": until_at.isoformat() if until_at else "",
        }


class ReleaseForm(forms.Form):
    reason = forms.CharField(
        label="Why may it go on?",
        max_length=300,
        help_text="Kept in the audit log; callers do not see it.",
        widget=UnfoldAdminTextInputWidget,
    )


def find_organization(text: str) -> str:
    """Return the id of the one organization that ``text`` names, else ``text``."""
    found = Organization.objects.filter(
        Q(public_id=text) | Q(name__iexact=text) | Q(personal_of__email__iexact=text)
    ).values_list("public_id", flat=True)[:2]
    return found[0] if len(found) == 1 else text
