"""Owners see what callers keep, not what is in it; cancel and delete it as its callers would, and it is written down."""

from datetime import timedelta
from typing import Any

import pytest
from django.core.files.base import ContentFile
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from apps.accounts.models import AuditEvent, User
from apps.gateway.files import keeping
from apps.gateway.models import Batch, StoredFile, StoredResponse
from tests.apps.conftest import Cast


@pytest.fixture
def browser(cast: Cast) -> Client:
    browser = Client()
    browser.force_login(User.objects.create_superuser("root@example.com", "x"))
    return browser


@pytest.fixture
def kept(cast: Cast, settings: Any, tmp_path: Any) -> tuple[StoredFile, Batch, StoredResponse]:
    soon = timezone.now() + timedelta(hours=1)
    name = keeping.get_storage().save("a-file", ContentFile(b"A private line"))
    file = StoredFile.objects.create(
        organization=cast.organization,
        state="ready",
        purpose="batch",
        filename="a.jsonl",
        size_bytes=14,
        storage_name=name,
    )
    batch = Batch.objects.create(
        organization=cast.organization,
        key_digest=cast.key.digest,
        endpoint="/v1/embeddings",
        input_file_id=file.public_id,
        status="in_progress",
        total_count=7,
        completed_count=3,
        expires_at=soon,
    )
    response = StoredResponse.objects.create(
        organization=cast.organization,
        status="completed",
        job_id="job_1",
        input_items=[{"role": "user", "content": "A private question"}],
        response={"model": "some-model", "output": ["A private answer"]},
        expires_at=soon,
    )
    return file, batch, response


def test_pages_show_whose_and_never_what(browser: Client, cast: Cast, kept: tuple[Any, ...]) -> None:
    for row in kept:
        place = f"admin:gateway_{row._meta.model_name}"
        for url in (reverse(f"{place}_changelist"), reverse(f"{place}_change", args=[row.pk])):
            page = browser.get(url)
            assert page.status_code == 200
            text = page.content.decode()
            assert row.public_id in text and "private" not in text and cast.key.digest not in text
        found = browser.get(reverse(f"{place}_changelist"), {"q": cast.organization.public_id})
        assert row.public_id in found.content.decode()
    assert "3 of 7 done" in browser.get(reverse("admin:gateway_batch_changelist")).content.decode()
    assert browser.post(reverse("admin:gateway_batch_delete", args=[kept[1].pk]), {"post": "yes"}).status_code == 403


def test_a_batch_is_cancelled_once(browser: Client, kept: tuple[Any, ...]) -> None:
    batch = kept[1]
    values = {"action": "cancel_selected", "_selected_action": [batch.pk]}
    url = reverse("admin:gateway_batch_changelist")
    assert b"1 batch starts no more requests" in browser.post(url, values, follow=True).content
    batch.refresh_from_db()
    assert batch.status == "cancelling"
    Batch.objects.update(status="completed")
    assert b"only one that is validating or in progress" in browser.post(url, values, follow=True).content
    assert [event.action for event in AuditEvent.objects.filter(target=f"batch:{batch.public_id}")] == ["batch.cancel"]


def test_files_go_with_their_bytes(browser: Client, kept: tuple[Any, ...]) -> None:
    file = kept[0]
    assert browser.post(reverse("admin:gateway_storedfile_delete", args=[file.pk]), {"post": "yes"}).status_code == 302
    assert not StoredFile.objects.exists() and not keeping.get_storage().exists(file.storage_name)
    assert AuditEvent.objects.get(target=f"file:{file.public_id}").action == "file.delete"


def test_responses_are_stopped_and_deleted(browser: Client, kept: tuple[Any, ...]) -> None:
    response = kept[2]
    url = reverse("admin:gateway_storedresponse_changelist")
    chosen = {"_selected_action": [response.pk]}
    StoredResponse.objects.update(status="in_progress")
    assert b"1 response is stopped" in browser.post(url, {"action": "cancel_selected"} | chosen, follow=True).content
    page = browser.post(url, {"action": "delete_selected", "post": "yes"} | chosen, follow=True)
    assert page.status_code == 200 and not StoredResponse.objects.exists()
    actions = AuditEvent.objects.filter(target=f"response:{response.public_id}").order_by("pk")
    assert [event.action for event in actions] == ["response.cancel", "response.delete"]


def test_staff_without_rights_sees_nothing(cast: Cast, kept: tuple[Any, ...]) -> None:
    browser = Client()
    browser.force_login(User.objects.create_user("staff@example.com", "x", is_staff=True))
    for row in kept:
        assert browser.get(reverse(f"admin:gateway_{row._meta.model_name}_changelist")).status_code == 403
