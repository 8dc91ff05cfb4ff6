"""`make bench-gate` measures what it says: every decision of it is admitted."""

import asyncio

import pytest
from redis import Redis

from deploy.bench import gate


@pytest.mark.django_db(transaction=True)
def test_the_gates_bench_runs(
    client: Redis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client.flushall()
    monkeypatch.setattr(gate, "ROUND_S", 0.1)
    asyncio.run(gate.measure(gate.make_caller(), 0.05))
    assert "One decision costs one Redis trip and no SQL" in capsys.readouterr().out
