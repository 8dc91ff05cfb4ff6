"""Check what people send to the keys page."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from django import forms
from django.conf import settings
from django.utils import timezone
from django.utils.module_loading import import_string

from aiscale.money_forms import UsdField
from apps.accounts.keys import MAX_NUMBER, NAME_CHARS, KeyTerms

_DAYS = (
    ("", "Never"),
    ("1", "In a day"),
    ("7", "In 7 days"),
    ("30", "In 30 days"),
    ("90", "In 90 days"),
    ("365", "In a year"),
)
_WINDOWS = (("60", "a minute"), ("3600", "an hour"), ("86400", "a day"))


def list_model_names() -> list[str]:
    """List the models that a key may be kept to. The catalog lies above this layer, so settings name it. I/O: as the catalog does."""
    read: Callable[[], list[str]] = import_string(settings.LIST_MODEL_NAMES)
    return read()


class KeyForm(forms.Form):
    """Ask what a key is for, and what it may do."""

    name = forms.CharField(
        label="What is it for?",
        max_length=NAME_CHARS,
        required=False,
        widget=forms.TextInput(attrs={"placeholder": "For example: my website", "autocomplete": "off"}),
    )
    expires = forms.ChoiceField(label="It expires", choices=_DAYS, required=False)
    models = forms.MultipleChoiceField(
        label="It may use", required=False, widget=forms.CheckboxSelectMultiple, help_text="None chosen: all models."
    )
    requests = forms.IntegerField(label="Requests", min_value=1, max_value=MAX_NUMBER, required=False)
    window = forms.ChoiceField(label="in", choices=_WINDOWS, required=False)
    tokens_per_minute = forms.IntegerField(label="Tokens a minute", min_value=1, max_value=MAX_NUMBER, required=False)
    max_in_flight = forms.IntegerField(label="At a time", min_value=1, max_value=MAX_NUMBER, required=False)
    monthly_limit = UsdField(
        label="US dollars a month", required=False, widget=forms.NumberInput(attrs={"step": "any", "min": "0"})
    )
    can_manage = forms.BooleanField(
        label="It may also manage the organization",
        required=False,
        help_text="With your rights: members, invitations and keys over the API. Keep such a key off websites.",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["models"].choices = [(name, name) for name in list_model_names()]  # type: ignore[attr-defined]

    def make_terms(self) -> KeyTerms:
        """Return what was asked for. Only for a form that is valid."""
        values = self.cleaned_data
        return KeyTerms(
            expires_at=timezone.now() + timedelta(days=int(values["expires"])) if values["expires"] else None,
            allowed_models=tuple(values["models"]),
            requests_per_window=values["requests"],
            window_s=int(values["window"] or 60) if values["requests"] else None,
            tokens_per_minute=values["tokens_per_minute"],
            max_in_flight=values["max_in_flight"],
            monthly_limit_nanousd=values["monthly_limit"],
            can_manage=values["can_manage"],
        )
