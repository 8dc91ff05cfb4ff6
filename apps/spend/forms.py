"""Take money from forms."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from django import forms
from django.utils import timezone
from unfold.widgets import UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget

from aiscale.errors import AiscaleError
from aiscale.money_forms import UsdField
from apps.accounts.models import User
from apps.spend import budgets
from apps.spend.kill_forms import find_organization
from apps.spend.models import Budget

T = TypeVar("T")
_TWO_OR_ONE = re.compile(r"[0-9],[0-9]")
"""``$1,500`` is one amount to most people, and ``100,500`` two."""


class BudgetForm(forms.ModelForm):  # type: ignore[type-arg]  # generic in the stubs alone
    """Ask what a budget is for and what it allows. Kind and target make the scope, which stays as it is once saved."""

    KINDS = (
        ("organization", "One organization"),
        ("site", "The whole service"),
        ("plan", "All organizations of one plan"),
        ("model", "One model"),
        ("user", "One user"),
        ("key", "One API key"),
    )

    kind = forms.ChoiceField(label="For", choices=KINDS, widget=UnfoldAdminSelectWidget)
    target = forms.CharField(
        label="Which one",
        required=False,
        max_length=128,
        help_text="The plan's or model's short name; an organization's id (org_...) or name; a user's id (usr_...) or e-mail address; "
        "or a key's id (key_...). Empty for the whole service.",
        widget=UnfoldAdminTextInputWidget,
    )
    time_zone = forms.CharField(
        required=False,
        max_length=64,
        help_text="Where days and months begin, such as Europe/Berlin. Empty: the service's time zone.",
        widget=UnfoldAdminTextInputWidget,
    )
    limit_nanousd = UsdField(
        label="Limit (USD)",
        required=False,
        help_text="What does not fit is refused, as soon as you save. 0 stops all that costs money; empty refuses nothing. "
        "An organization's monthly limit replaces its plan's, upwards or downwards.",
    )
    thresholds = forms.CharField(
        required=False,
        help_text="Each alerts once a period: amounts and parts of the limit, such as $100, $500, 80%.",
        widget=UnfoldAdminTextInputWidget,
    )
    raise_nanousd = UsdField(label="Raised by (USD)", required=False)

    class Meta:
        model = Budget
        fields = ["period", "time_zone", "limit_nanousd", "thresholds", "raise_nanousd", "raise_until", "note"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.instance.pk:
            del self.fields["kind"], self.fields["target"]
            self.initial["thresholds"] = ", ".join(text.replace(",", "") for text in self.instance.thresholds)

    def clean_time_zone(self) -> str:
        return self._check("time_zone", lambda: budgets.check_time_zone(self.cleaned_data["time_zone"])) or ""

    def clean_raise_nanousd(self) -> int:
        return self.cleaned_data["raise_nanousd"] or 0

    def clean(self) -> dict[str, Any]:
        cleaned: dict[str, Any] = super().clean() or self.cleaned_data
        if not self.instance.pk:
            self._clean_scope(cleaned)
        limit = cleaned.get("limit_nanousd")
        # an organization's month always has a limit: its plan's
        has_limit = limit is not None or self.instance.scope.startswith("organization:")
        texts = self._clean_thresholds(cleaned, has_limit=has_limit)
        if limit is None and not texts:
            self.add_error("limit_nanousd", "Give a limit, thresholds, or both.")
        self._clean_raise(cleaned)
        return cleaned

    def _get_validation_exclusions(self) -> set[str]:
        # no field of the form, and yet chosen in it: there is one budget of a scope and period
        chosen = {"scope"} if self.instance.scope else set()
        return super()._get_validation_exclusions() - chosen  # type: ignore[no-any-return, misc]

    def _clean_thresholds(self, cleaned: dict[str, Any], *, has_limit: bool) -> list[str]:
        words = cleaned.get("thresholds", "")
        if _TWO_OR_ONE.search(words):
            self.add_error(
                "thresholds", "Write amounts without thousands separators: $1500, 80%, with a space after each comma."
            )
            return [words]
        texts = [text for text in words.replace(";", ",").split(",") if text.strip()]
        cleaned["thresholds"] = (
            self._check("thresholds", lambda: budgets.parse_thresholds(texts, has_limit=has_limit)) or []
        )
        return texts

    def _clean_raise(self, cleaned: dict[str, Any]) -> None:
        until = cleaned.get("raise_until")
        if not cleaned.get("raise_nanousd"):
            return
        if not until:
            self.add_error("raise_until", "Say until when the limit is raised.")
        elif until <= timezone.now() and {"raise_nanousd", "raise_until"} & set(self.changed_data):
            # a raise that is over may stay as it is while something else is changed
            self.add_error("raise_until", "This moment is over: the limit would not be raised.")

    def _clean_scope(self, cleaned: dict[str, Any]) -> None:
        kind, target = cleaned.get("kind", ""), cleaned.get("target", "").strip()
        if kind == "site" and target:
            self.add_error("target", "Leave this empty for the whole service, or choose what this names.")
        if not kind or (kind != "site" and not target):
            self.add_error("target", "Say which one.")
            return
        scope = "site" if kind == "site" else f"{kind}:{_find_id(kind, target)}"
        self._check("target", lambda: budgets.check_scope(scope))
        self.instance.scope = scope

    def _check(self, field: str, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except AiscaleError as error:
            self.add_error(field, error.message)
            return None


def _find_id(kind: str, target: str) -> str:
    """Return the id of what is named in another way, else ``target``. I/O: up to one SQL statement."""
    if kind == "organization":
        return find_organization(target)
    if kind == "user" and "@" in target:
        return User.objects.filter(email__iexact=target).values_list("public_id", flat=True).first() or target
    return target
