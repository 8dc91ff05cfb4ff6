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
from apps.accounts.models import ApiKey

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


class KeyChangeForm(KeyForm):
    """Ask what a key that is there may do from now on. Empty: no such limit."""

    expires = forms.DateTimeField(  # type: ignore[assignment]
        label="It expires (UTC)",
        required=False,
        widget=forms.DateTimeInput(attrs={"type": "datetime-local"}, format="%Y-%m-%dT%H:%M"),
        input_formats=["%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"],
    )

    def __init__(self, key: ApiKey, terms: KeyTerms, *args: Any) -> None:
        self.terms = terms
        initial = {
            "name": key.name,
            "expires": terms.expires_at,
            "models": list(terms.allowed_models),
            "requests": terms.requests_per_window,
            "window": str(terms.window_s or 60),
            "tokens_per_minute": terms.tokens_per_minute,
            "max_in_flight": terms.max_in_flight,
            "monthly_limit": terms.monthly_limit_nanousd,
        }
        super().__init__(*args, initial=initial)
        del self.fields["can_manage"]
        # what it may do already can be kept, also where it is no longer on the list
        names = dict.fromkeys([*list_model_names(), *terms.allowed_models])
        self.fields["models"].choices = [(name, name) for name in names]  # type: ignore[attr-defined]
        if terms.window_s is not None and str(terms.window_s) not in dict(_WINDOWS):
            own = (str(terms.window_s), f"{terms.window_s} seconds")
            self.fields["window"].choices = [own, *_WINDOWS]  # type: ignore[attr-defined]

    def read_changes(self) -> dict[str, Any]:
        """Return what the key may do, as `keys.change_key` takes it. Only for a form that is valid."""
        values, before = self.cleaned_data, self.terms.expires_at
        expires_at = values["expires"]
        # the page shows minutes: who leaves the time alone does not cut its seconds off
        if before is not None and expires_at == before.replace(second=0, microsecond=0):
            expires_at = before
        return {
            "name": values["name"],
            "expires_at": expires_at,
            "allowed_models": tuple(values["models"]),
            "requests_per_window": values["requests"],
            "window_s": int(values["window"] or 60) if values["requests"] else None,
            "tokens_per_minute": values["tokens_per_minute"],
            "max_in_flight": values["max_in_flight"],
            "monthly_limit_nanousd": values["monthly_limit"],
        }
