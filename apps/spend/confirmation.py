"""Ask in a form of the admin, say in sentences what will happen, and do it once that is confirmed."""

from collections.abc import Callable, Sequence
from typing import Any

from django import forms
from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.template.response import TemplateResponse

from aiscale.errors import AiscaleError


def ask(
    request: HttpRequest,
    form: forms.Form,
    *,
    context: dict[str, Any],
    title: str,
    button: str,
    preview: Callable[[dict[str, Any]], Sequence[str]],
    act: Callable[[dict[str, Any]], str],
    back: str,
    doubts: Callable[[dict[str, Any]], Sequence[str]] = lambda values: (),
) -> HttpResponse:
    """Answer one of the three requests: the empty form, its preview, and the confirmed order.

    ``preview``, ``doubts`` and ``act`` get the form's cleaned data; ``preview`` returns sentences, ``doubts`` those that look like a
    mistake and must be answered by ticking ``sure``, ``act`` what was done. An AiscaleError of theirs is shown at the field that it
    names. ``back`` is the URL of the list behind the form.
    """
    sentences: Sequence[str] = ()
    warnings: Sequence[str] = ()
    if request.method == "POST" and form.is_valid():
        try:
            warnings = doubts(form.cleaned_data)
            if "confirm" in request.POST and ("sure" in request.POST or not warnings):
                messages.success(request, act(form.cleaned_data))
                return redirect(back)
            sentences = preview(form.cleaned_data)
        except AiscaleError as error:
            form.add_error(error.param if error.param in form.fields else None, error.message)
    values = {**context, "title": title, "form": form, "sentences": sentences, "warnings": warnings}
    values |= {"button": button, "back": back}
    return TemplateResponse(request, "admin/spend/confirm.html", values)
