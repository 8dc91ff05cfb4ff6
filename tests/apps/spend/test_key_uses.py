"""A key says when it was used last: settlement writes it down from what it charges, and no request pays for that."""

from datetime import UTC, datetime

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from redis import Redis

from apps.accounts.keys import create_key, note_uses
from apps.accounts.models import ApiKey
from apps.spend.settlement import Settler
from tests.apps.conftest import Cast
from tests.apps.spend.cast import make_finished, send

NOON = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


def read(key: ApiKey) -> datetime | None:
    key.refresh_from_db()
    return key.last_used_at


def test_settlement_writes_it_down(cast: Cast, redis_url: str) -> None:
    other, _ = create_key(cast.organization, cast.user, "unused")
    events = [make_finished(cast.organization.public_id, key_id=cast.key.public_id) for _ in range(3)]
    send([*events, make_finished(cast.organization.public_id, key_id=None), make_finished("org_x", key_id="key_gone")])
    settler = Settler(Redis.from_url(redis_url))
    settler.turn(1)
    used_at = read(cast.key)
    assert used_at is not None and int(used_at.timestamp() * 1000) == max(event.finished_at_ms for event in events)
    assert read(other) is None
    with CaptureQueriesContext(
        connection,
    ) as queries:
        settler._note_uses()
    assert len(queries) == 0, "what is written is not written again"


def test_it_moves_forward_a_minute_at_a_time(cast: Cast) -> None:
    note_uses({cast.key.public_id: NOON, "key_gone": NOON})
    assert read(cast.key) == NOON
    for later in (NOON.replace(second=59), NOON.replace(hour=11)):
        note_uses({cast.key.public_id: later})
        assert read(cast.key) == NOON
    note_uses({cast.key.public_id: NOON.replace(minute=2)})
    assert read(cast.key) == NOON.replace(minute=2)


@pytest.mark.django_db(transaction=True)
def test_a_key_that_somebody_holds_is_not_waited_for(cast: Cast) -> None:
    """M8: rows that are locked in random order make deadlocks, and lose what was to be written."""
    from threading import Thread

    from django.db import transaction

    with transaction.atomic():
        ApiKey.objects.select_for_update().get(pk=cast.key.pk)

        def note() -> None:
            note_uses({cast.key.public_id: NOON})
            connection.close()

        thread = Thread(target=note)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), "it waited"
    assert read(cast.key) is None
