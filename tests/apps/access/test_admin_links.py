"""Whoever sees a link or a button of the admin may use it: administrators, and staff who may only look."""

import re
from html import unescape
from urllib.parse import urljoin, urlsplit

import pytest
from django.contrib import admin
from django.contrib.auth.models import Permission
from django.test import Client, RequestFactory

from apps.accounts.models import ApiKey, User
from tests.apps.access.world import World

ACTS = re.compile(r'<button[^>]+name="_(?:save|continue|addanother|saveasnew)"|<a[^>]+class="[^"]*deletelink')


def make_viewer() -> User:
    viewer = User.objects.create_user("viewer@example.com", "x", is_staff=True)
    viewer.user_permissions.set(Permission.objects.filter(codename__startswith="view_"))
    return viewer


@pytest.mark.parametrize("name", ["superuser", "viewer"])
def test_every_link_of_the_admin_leads_somewhere(world: World, name: str) -> None:
    browser = Client()
    browser.force_login(world.users["superuser"] if name == "superuser" else make_viewer())
    waiting, seen, found = [("/admin/", "")], {"/admin/"}, []
    while waiting:
        url, source = waiting.pop()
        page = browser.get(url)
        found.append(url)
        assert page.status_code in (200, 302), f"{source} leads to {url}, which answers {page.status_code}"
        if page.status_code == 302 or "text/html" not in page["Content-Type"]:
            continue
        text = page.content.decode()
        assert text.count("<main ") == text.count("</main>") == 1, f"{url} has no main part, or more than one"
        if "?" in url:
            # each filter and order once, not all of them together
            continue
        assert name == "superuser" or not ACTS.search(text), f"{url} offers to save or delete"
        for link in re.findall(r'href="([^"#]+)', text):
            to = urlsplit(urljoin(url, unescape(link)))
            # one row stands for all, and one value of a filter
            kind = f"{re.sub('[0-9]+', '0', to.path)}?{to.query.partition('=')[0]}"
            if to.netloc == "" and to.path.startswith("/admin/") and "logout" not in to.path and kind not in seen:
                seen.add(kind)
                waiting.append((f"{to.path}?{to.query}" if to.query else to.path, url))
    # of each table its list, and one of its rows
    assert len(found) > 50, found


def test_no_action_of_a_list_is_open_to_whoever_may_look(world: World) -> None:
    request = RequestFactory().get("/admin/")
    request.user = make_viewer()
    offered = {model.__name__: list(site.get_actions(request)) for model, site in admin.site._registry.items()}
    assert {name: actions for name, actions in offered.items() if actions} == {}
    browser = Client()
    browser.force_login(request.user)
    key = ApiKey.objects.filter(revoked_at=None)[0]
    browser.post("/admin/accounts/apikey/", {"action": "revoke_selected", "_selected_action": [key.pk]})
    key.refresh_from_db()
    assert key.revoked_at is None
