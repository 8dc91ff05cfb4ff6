"""What two versions of a model do at this moment is told apart; what is gone is said no more."""

from prometheus_client import REGISTRY

from workers.engine.step_report import StepReport
from workers.generators import forget_gauges, meter


def make_step(running: int) -> StepReport:
    return StepReport(
        seconds=0.01,
        running=running,
        waiting=running + 1,
        prefilled=4,
        decoded=running,
        asked=4,
        reused=0,
        kv_tokens=running * 10,
        kept_tokens=7,
        first_tokens_s=[0.02],
        gaps_s=[0.01],
    )


def read(name: str, version: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"model": "metered", "version": version, **labels})


def test_versions_of_a_model_have_gauges_of_their_own() -> None:
    meter("metered", "old")(make_step(3))
    meter("metered", "new")(make_step(1))
    assert (read("aiscale_engine_running", "old"), read("aiscale_engine_running", "new")) == (3, 1)
    assert (read("aiscale_engine_waiting", "old"), read("aiscale_engine_waiting", "new")) == (4, 2)
    assert read("aiscale_engine_kv_tokens", "old", use="running") == 30
    assert REGISTRY.get_sample_value("aiscale_engine_tokens_total", {"model": "metered", "kind": "prompt"}) == 8
    forget_gauges("metered", "old")
    forget_gauges("metered", "never")
    assert read("aiscale_engine_running", "old") is None and read("aiscale_engine_running", "new") == 1
