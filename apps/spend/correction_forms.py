"""Take credits, refunds and adjustments from forms of the admin."""

from typing import Any

from django import forms
from django.db.models import Q
from unfold.widgets import UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget

from aiscale.money_forms import UsdField
from apps.accounts.models import Organization
from apps.spend import corrections


class OrganizationField(forms.CharField):
    """Take an organization's id, its name, or the e-mail address of its one person; give its id."""

    def __init__(self, **kwargs: Any) -> None:
        defaults: dict[str, Any] = {
            "max_length": 254,
            "widget": UnfoldAdminTextInputWidget,
            "help_text": "Its id (org_...), its name, or the e-mail address of whoever it belongs to.",
        }
        super().__init__(**defaults | kwargs)

    def clean(self, value: Any) -> str:
        text = super().clean(value)
        if not text:
            return ""
        found = Organization.objects.filter(
            Q(public_id=text) | Q(name__iexact=text) | Q(personal_of__email__iexact=text)
        ).values_list("public_id", flat=True)[:2]
        if not found:
            raise forms.ValidationError("There is no such organization. Copy its id from the list.")
        if len(found) > 1:
            raise forms.ValidationError("Several organizations have this name. Give the id.")
        return str(found[0])


class CorrectionForm(forms.Form):
    """Ask why, and carry the reference that lets a correction be posted once, however often its page is sent."""

    reason = forms.CharField(
        max_length=corrections.MAX_REASON_CHARS,
        widget=UnfoldAdminTextInputWidget,
        help_text="The organization reads this on its statement.",
    )
    reference = forms.RegexField(r"^corr_[0-9a-z]{26}$", widget=forms.HiddenInput)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["initial"] = {"reference": corrections.make_reference(), **(kwargs.get("initial") or {})}
        super().__init__(*args, **kwargs)


class CreditForm(CorrectionForm):
    organization = OrganizationField()
    amount = UsdField(label="Amount (USD)")
    source = forms.ChoiceField(
        choices=[("prepaid", "Prepaid: the organization has paid for it"), ("goodwill", "Goodwill: a present")],
        widget=UnfoldAdminSelectWidget,
    )
    field_order = ["organization", "amount", "source", "reason"]


class AdjustmentForm(CorrectionForm):
    organization = OrganizationField()
    direction = forms.ChoiceField(
        choices=[("less", "Give back: it was charged too much"), ("more", "Charge more: it was charged too little")],
        widget=UnfoldAdminSelectWidget,
    )
    amount = UsdField(label="Amount (USD)")
    field_order = ["organization", "direction", "amount", "reason"]

    def signed_nanousd(self) -> int:
        """Return what is added to the charges: negative when something is given back."""
        amount: int = self.cleaned_data["amount"]
        return amount if self.cleaned_data["direction"] == "more" else -amount


class RefundForm(CorrectionForm):
    amount = UsdField(label="Amount (USD)", help_text="At most what is left of the request's cost.")
    field_order = ["amount", "reason"]
