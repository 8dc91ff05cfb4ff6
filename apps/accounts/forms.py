"""Check what people send to the keys page."""

from django import forms


class KeyForm(forms.Form):
    """Ask what a key is for."""

    name = forms.CharField(
        label="What is it for?",
        max_length=80,
        required=False,
        widget=forms.TextInput(attrs={"placeholder": "For example: my website", "autocomplete": "off"}),
    )
