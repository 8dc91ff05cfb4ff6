"""Take prices from the admin: US dollars for a million tokens."""

from typing import Any

from django import forms
from django.utils import timezone
from unfold.widgets import UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget

from aiscale.money_forms import PerMillionField, UsdField
from apps.spend import prices

_UNIT = "USD per million tokens"


class TermsForm(forms.Form):
    """Ask for a model and what it costs. The model's present price fills it in."""

    model = forms.ChoiceField(widget=UnfoldAdminSelectWidget)
    prompt_nanousd_per_token = PerMillionField(label=f"Prompt price ({_UNIT})")
    cached_prompt_nanousd_per_token = PerMillionField(
        label=f"Cached prompt price ({_UNIT})",
        required=False,
        help_text="For prompt tokens that the worker had computed before. Empty: as other prompt tokens.",
    )
    completion_nanousd_per_token = PerMillionField(label=f"Completion price ({_UNIT})")
    request_nanousd = UsdField(
        label="Flat price of a request (USD)", required=False, help_text="Added to each request. Empty: nothing."
    )

    def __init__(self, *args: Any, model: str = "", **kwargs: Any) -> None:
        current = prices.map_current()
        price = current.get(model)
        if price is not None:
            kwargs["initial"] = {"model": model, **_initial(prices.terms_of(price))}
        super().__init__(*args, **kwargs)
        field = self.fields["model"]
        assert isinstance(field, forms.ChoiceField)
        field.choices = [(slug, slug) for slug in sorted({*current, model} - {""})]

    def read_terms(self) -> prices.Terms:
        """Return the prices of a valid form."""
        values = self.cleaned_data
        prompt, cached = values["prompt_nanousd_per_token"], values["cached_prompt_nanousd_per_token"]
        return prices.Terms(
            prompt_nanousd_per_token=prompt,
            cached_prompt_nanousd_per_token=prompt if cached is None else cached,
            completion_nanousd_per_token=values["completion_nanousd_per_token"],
            request_nanousd=values["request_nanousd"] or 0,
        )


class PriceForm(TermsForm):
    """Ask for one model's new price."""

    valid_from = forms.DateTimeField(
        label="From (UTC)",
        required=False,
        widget=UnfoldAdminTextInputWidget(attrs={"placeholder": "2026-12-01 00:00"}),
        help_text="Empty: from now on. It cannot lie in the past.",
    )
    reason = forms.CharField(max_length=300, widget=UnfoldAdminTextInputWidget, help_text="For the audit log.")

    def clean_valid_from(self) -> Any:
        moment = self.cleaned_data["valid_from"]
        if moment is not None and moment < timezone.now():
            raise forms.ValidationError("A price cannot begin in the past. To mend past charges, rate the usage again.")
        return moment


class RerateForm(TermsForm):
    """Ask which past requests should have cost what."""

    since = forms.DateTimeField(
        label="Admitted from (UTC)", widget=UnfoldAdminTextInputWidget(attrs={"placeholder": "2026-11-01 00:00"})
    )
    until = forms.DateTimeField(
        label="until before (UTC)",
        widget=UnfoldAdminTextInputWidget(attrs={"placeholder": "2026-11-02 12:30"}),
        help_text="Change the price first, if that is still wrong: requests that come after this moment keep theirs.",
    )
    reason = forms.CharField(
        max_length=300, widget=UnfoldAdminTextInputWidget, help_text="The organizations read this on their statement."
    )
    field_order = ["model", "since", "until"]


def _initial(terms: prices.Terms) -> dict[str, int]:
    return {
        "prompt_nanousd_per_token": terms.prompt_nanousd_per_token,
        "cached_prompt_nanousd_per_token": terms.cached_prompt_nanousd_per_token,
        "completion_nanousd_per_token": terms.completion_nanousd_per_token,
        "request_nanousd": terms.request_nanousd,
    }
