"""What the main paths cost in SQL statements and Redis trips is written down, and changes only on purpose (D2)."""

import json

from aiscale import io_counts
from aiscale.management.commands.io_report import BASELINE, make_session
from apps.accounts.callers import on_thread
from tests.apps.conftest import Cast


async def test_the_main_paths_cost_what_the_baseline_says(cast: Cast, worker: None) -> None:
    """`manage.py io_report --write` replaces the baseline; its diff shows the reviewer what a change costs."""
    session = await on_thread(lambda: make_session(cast.user))
    counts = await io_counts.measure(cast.raw, session)
    assert counts == json.loads(BASELINE.read_text(encoding="utf-8"))
    for path, count in counts.items():
        if path.startswith(("GET /v1", "POST /v1")):
            # what no nearer level of the cache knows is looked for in the last one
            level_3 = ["SELECT inference_cachedanswer"] if path == "POST /v1/embeddings" else []
            assert count["sql"] == level_3, f"{path}: no SQL on the API's hot path"
