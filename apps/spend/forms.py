"""Take money and kill switches from forms."""

from typing import Any

from django import forms
from unfold.widgets import UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget

from aiscale.errors import AiscaleError
from aiscale.money_forms import UsdField
from apps.spend import killswitch
from apps.spend.models import Budget


class BudgetForm(forms.ModelForm):  # type: ignore[type-arg]  # generic in the stubs alone
    monthly_limit_nanousd = UsdField(
        label="Monthly limit (USD)",
        help_text="Replaces the plan's limit for this organization, upwards or downwards, as soon as you save. "
        "0 stops everything that costs money. Delete the budget to go back to the plan's limit.",
    )

    class Meta:
        model = Budget
        fields = ["organization", "monthly_limit_nanousd", "note"]


class TripForm(forms.Form):
    """Ask what to stop and why. ``cleaned_data["scope"]`` is the checked scope."""

    KINDS = (("site", "Everything"), ("model", "One model"), ("organization", "One organization"))

    kind = forms.ChoiceField(label="Stop", choices=KINDS, widget=UnfoldAdminSelectWidget)
    target = forms.CharField(
        label="Which one",
        required=False,
        max_length=128,
        help_text="The model's name, or the organization's id (org_...).",
        widget=UnfoldAdminTextInputWidget,
    )
    reason = forms.CharField(
        label="Reason",
        max_length=300,
        help_text="Everybody whose request is stopped reads this sentence.",
        widget=UnfoldAdminTextInputWidget,
    )

    def clean(self) -> dict[str, Any]:
        cleaned: dict[str, Any] = super().clean() or self.cleaned_data
        kind, target = cleaned.get("kind"), cleaned.get("target", "")
        if kind == "site" and target:
            self.add_error("target", "Leave this empty to stop everything, or choose what this names.")
        elif kind:
            scope = "site" if kind == "site" else f"{kind}:{target}"
            try:
                killswitch.check_scope(scope)
            except AiscaleError as error:
                self.add_error("target", error.message)
            cleaned["scope"] = scope
        return cleaned
