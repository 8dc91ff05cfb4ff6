"""Odd addresses in the admin get a page or a redirect, never a server error."""

import pytest
from django.contrib import admin
from django.test import Client
from django.urls import reverse
from django.utils.http import urlencode

from tests.apps.accounts.test_admin import browser
from tests.apps.conftest import Cast

__all__ = ["browser"]
OURS = ("accounts", "spend", "inference", "chat", "gateway", "knowledge")
MODELS = [model for model in admin.site._registry if model._meta.app_label in OURS]
ODD = ["\0", "9" * 23, "abc' OR 1=1 --𝕏%"]


def queries_of(model: type) -> list[dict[str, str]]:
    """Every parameter of the list with every odd value, and some together."""
    change_list = admin.site._registry[model]
    names = ["q", "o", "p", "_to_field", "nothing", "id__exact"]
    for item in change_list.list_filter or ():
        field = item[0] if isinstance(item, tuple) else item
        names.append(field if isinstance(field, str) else field.parameter_name)
    if change_list.date_hierarchy:
        names += [f"{change_list.date_hierarchy}__{part}" for part in ("year", "month")]
    return [{name: value} for name in names for value in ODD] + [{"o": "999", "p": "abc", "q": "\0"}]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_lists_bear_any_parameter(browser: Client, cast: Cast, model: type) -> None:
    place = f"admin:{model._meta.app_label}_{model._meta.model_name}"  # type: ignore[attr-defined]
    browser.raise_request_exception = False
    failed = []
    for query in queries_of(model):
        answer = browser.get(reverse(f"{place}_changelist") + "?" + urlencode(query))
        if answer.status_code not in (200, 302, 400):
            failed.append((query, answer.status_code))
    assert browser.get(reverse(f"{place}_changelist") + "?" + urlencode({"q": "\0"})).status_code == 400
    for odd in ("0", "abc", "99999999999999999999999", "_00", "a_2F_5F", "%00"):
        answer = browser.get(reverse(f"{place}_changelist") + f"{odd}/change/")
        if answer.status_code not in (302, 400, 404):
            failed.append((odd, answer.status_code))
    assert not failed, failed


PAGES = [
    "/c/?page=%00",
    "/c/%00/",
    "/account/usage/?month=%00",
    "/account/usage/?organization=%00",
    "/api/v1/usage?month=%00",
]
PAGES += ["/accounts/login/?next=%00", "/?model=%00", "/c/?q=%00", "/%00", "/explain/%00/", "/v1/models/%00"]


@pytest.mark.parametrize("path", PAGES)
def test_our_own_pages_bear_nul_characters(cast: Cast, path: str) -> None:
    browser = Client()
    browser.force_login(cast.user)
    assert browser.get(path).status_code in (200, 302, 400, 401, 404)
