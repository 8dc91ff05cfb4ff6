"""Tokens are drawn as the parameters say, alone and in any company."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from workers.engine.detokenizer import Detokenizer
from workers.engine.sampler import Chosen, choose, make_rng
from workers.engine.sequence import Params, Sequence

CHANCES = np.array([0.5, 0.3, 0.15, 0.05])
LOGITS = np.log(CHANCES).astype(np.float32)
TOKENIZER = Tokenizer(WordLevel({"x": 0}, unk_token="x"))


def make(seed: int | None = 3, choice: int = 0, prompt: list[int] | None = None, **params: Any) -> Sequence:
    return Sequence(
        job_id="j",
        prompt=prompt or [0],
        params=Params(**{"max_tokens": 9} | params),
        priority=0,
        deadline_s=1e12,
        detokenizer=Detokenizer(TOKENIZER),
        on_output=lambda output: None,
        rng=make_rng(seed, choice),
    )


def one(sequence: Sequence, logits: NDArray[np.float32] = LOGITS) -> Chosen:
    [chosen] = choose(logits[None].copy(), [sequence])
    return chosen


def draw(count: int, **params: Any) -> list[float]:
    """Return how often each token came."""
    sequence = make(**params)
    drawn = [one(sequence).token_id for _ in range(count)]
    return [drawn.count(token) / count for token in range(len(LOGITS))]


def test_zero_takes_the_likeliest() -> None:
    assert draw(50, temperature=0.0) == [1, 0, 0, 0]


def test_chances_are_the_models() -> None:
    assert draw(10_000, temperature=1.0) == pytest.approx(CHANCES.tolist(), abs=0.02)


def test_a_high_temperature_flattens() -> None:
    roots = np.sqrt(CHANCES)
    assert draw(10_000, temperature=2.0) == pytest.approx((roots / roots.sum()).tolist(), abs=0.02)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_p": 0.4}, 1),
        ({"top_p": 0.6}, 2),
        ({"top_p": 0.9}, 3),
        ({"top_p": 0.99}, 4),
        ({"top_k": 1}, 1),
        ({"top_k": 3}, 3),
        ({"top_k": 50}, 4),
        ({"min_p": 0.7}, 1),
        ({"min_p": 0.25}, 3),
        ({"min_p": 0.09}, 4),
        ({"top_k": 2, "top_p": 0.6}, 1),
        ({"top_k": 3, "min_p": 0.5}, 2),
    ],
)
def test_filters_keep_the_likeliest(params: dict[str, Any], kept: int) -> None:
    """Of the two likeliest tokens, 0.6 of what they have together is the first alone."""
    drawn = draw(4_000, **params)
    assert [share > 0 for share in drawn] == [n < kept for n in range(4)]
    assert drawn == pytest.approx([*(CHANCES[:kept] / CHANCES[:kept].sum()), *[0] * (4 - kept)], abs=0.04)


@pytest.mark.parametrize(
    "params", [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.02}, {"top_p": 0.999999}, {"top_k": 900}]
)
def test_filters_agree_with_the_definition_on_flat_and_steep_rows(params: dict[str, Any]) -> None:
    """Sort everything, as the definition says, and compare which tokens can come."""
    for seed, heat in enumerate((0.02, 0.5, 3.0, 30.0)):
        logits = (np.random.default_rng(seed).standard_normal(1_000) * heat).astype(np.float32)
        chances = np.exp(logits.astype(np.float64) - logits.max())
        order = np.argsort(-chances, kind="stable")
        order = order[: params.get("top_k", len(order))]
        running = np.cumsum(chances[order])
        order = order[: int(np.searchsorted(running, params.get("top_p", 1.0) * running[-1])) + 1]
        order = order[chances[order] >= params.get("min_p", 0.0)]
        sequence = make(temperature=1.0, **params)
        assert {one(sequence, logits).token_id for _ in range(300)} <= set(order.tolist())


def test_a_draw_never_takes_what_cannot_come() -> None:
    logits = np.full(1_000, -np.inf, np.float32)
    logits[[3, 700, 999]] = 0.0
    sequence = make(temperature=1.0)
    assert {one(sequence, logits).token_id for _ in range(200)} == {3, 700, 999}


@pytest.mark.parametrize("seed", [0, 7, -1, -(1 << 63), (1 << 63) - 1])
def test_equal_seeds_draw_equally_in_any_company(seed: int) -> None:
    rows = np.random.default_rng(0).standard_normal((20, 5_000)).astype(np.float32)
    kinds: list[dict[str, Any]] = [{}, {"top_p": 0.8}, {"top_k": 5}, {"temperature": 0.0}, {"presence_penalty": 1.0}]
    alone = [one(make(seed=seed, **kinds[at % 5]), row).token_id for at, row in enumerate(rows)]
    together = choose(rows.copy(), [make(seed=seed, **kinds[at % 5]) for at in range(20)])
    assert [chosen.token_id for chosen in together] == alone


def test_choices_of_one_seed_differ_and_repeat() -> None:
    flat = np.zeros(5_000, np.float32)
    drawn = [[one(make(seed=5, choice=choice), flat).token_id for choice in range(4)] for _ in range(2)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 4


def test_penalties_look_at_what_was_said() -> None:
    said = make(temperature=0.0, presence_penalty=0.6)
    for token_id in (0, 0, 0):
        said.append(token_id)
    assert one(said).token_id == 1, "0.6 is more than ln(0.5/0.3), and counts once"
    often = make(temperature=0.0, frequency_penalty=0.2)
    often.append(0)
    assert one(often).token_id == 0
    for _ in range(2):
        often.append(0)
    assert one(often).token_id == 1
    echo = make(temperature=0.0, repetition_penalty=3.0, prompt=[0])
    assert one(echo).token_id == 1, "the prompt counts too"
    assert one(make(temperature=0.0, presence_penalty=2.0, prompt=[0])).token_id == 0, "here it does not"


def test_a_bias_moves_tokens() -> None:
    bias = np.array([3, 0]), np.array([100.0, -100.0], np.float32)
    assert one(make(temperature=0.0, bias=bias)).token_id == 3


def test_logprobs_are_the_models_own() -> None:
    chosen = one(make(temperature=0.0, bias=(np.array([2]), np.array([9.0], np.float32)), top_logprobs=2))
    assert chosen.logprob is not None and chosen.token_id == 2
    assert chosen.logprob.value == pytest.approx(np.log(0.15), abs=1e-5)
    assert [token for token, _ in chosen.logprob.top] == [0, 1]
    assert [value for _, value in chosen.logprob.top] == pytest.approx(np.log([0.5, 0.3]).tolist(), abs=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_fail_their_row_alone(bad: float) -> None:
    rows = np.stack([LOGITS, LOGITS, LOGITS])
    rows[1, 2] = bad
    chosen = choose(rows, [make(temperature=0.0) for _ in range(3)])
    assert [each.error is None for each in chosen] == [True, False, True]
    assert "not finite" in (chosen[1].error or "")


def test_a_row_that_cannot_be_changed_fails_alone() -> None:
    impossible = make(bias=(np.array([99]), np.array([1.0], np.float32)))
    chosen = choose(np.stack([LOGITS, LOGITS]), [impossible, make(temperature=0.0)])
    assert "IndexError" in (chosen[0].error or "") and chosen[1].token_id == 0
