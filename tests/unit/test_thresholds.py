"""What the semantic cache learns of one entry, and that the owner's bound holds whatever comes."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.inference.cache import thresholds
from apps.inference.cache.thresholds import Account, Observation

similarities = st.floats(0.0, 1.0)
observations = st.lists(st.tuples(similarities, st.booleans()), max_size=80)
rates = st.floats(0.001, 0.1)


@given(similarities, observations)
def test_a_risk_is_a_chance(similarity: float, seen: list[Observation]) -> None:
    assert 0.0 <= thresholds.find_risk(similarity, seen, thresholds.make_prior()) <= 1.0


@given(st.tuples(similarities, similarities), observations)
def test_more_alike_is_never_more_risky(pair: tuple[float, float], seen: list[Observation]) -> None:
    low, high = (thresholds.find_risk(each, seen, thresholds.make_prior()) for each in sorted(pair))
    assert high <= low + 1e-9


@given(similarities, st.lists(st.tuples(similarities, st.booleans()), max_size=20))
def test_what_proved_right_lowers_the_risk_there_and_what_proved_wrong_raises_it(
    similarity: float, seen: list[Observation]
) -> None:
    prior = thresholds.make_prior()
    before = thresholds.find_risk(similarity, seen, prior)
    assert thresholds.find_risk(similarity, [*seen, (similarity, True)], prior) <= before + 1e-6
    assert thresholds.find_risk(similarity, [*seen, (similarity, False)], prior) >= before - 1e-6


def test_entries_learn_thresholds_of_their_own_c5() -> None:
    """C5: no one threshold: an entry that was right from 0.8 on answers at 0.85, and one that was wrong up to 0.9 does not."""
    prior = thresholds.make_prior()
    easy: list[Observation] = [(0.8, True), (0.82, True), (0.6, False)] * 8
    hard: list[Observation] = [(0.9, False), (0.88, False), (0.97, True)] * 8
    assert thresholds.find_risk(0.85, easy, prior) < 0.05
    assert thresholds.find_risk(0.85, hard, prior) > 0.9


def test_a_new_entry_begins_with_what_the_others_learned() -> None:
    alike: list[list[Observation]] = [[(0.8, True), (0.75, True), (0.6, False)] for _ in range(60)]
    learned = thresholds.unpack_prior(thresholds.pack_prior(thresholds.learn_prior(alike)))
    assert learned.sum() == pytest.approx(1.0, abs=1e-5)
    first = thresholds.find_risk(0.85, [], thresholds.make_prior())
    assert thresholds.find_risk(0.85, [], learned) < first / 3
    assert np.array_equal(thresholds.learn_prior([[], []]), thresholds.make_prior())
    assert np.array_equal(thresholds.unpack_prior(b"of another grid"), thresholds.make_prior())


@settings(max_examples=200)
@given(rates, st.lists(st.floats(0.0, 1.0), max_size=300))
def test_the_account_is_never_overdrawn(rate: float, risks: list[float]) -> None:
    """Whatever the risks are and in whatever order they come, those taken add up to at most the bound times the look-ups."""
    account = Account()
    for risk in risks:
        account = account.look()
        if thresholds.may_reuse(risk, account, rate, draw=0.5):
            account = account.spend(risk)
        assert account.spent <= rate * account.lookups + 1e-9
        assert thresholds.find_allowance(account, rate) <= thresholds.MOST_RISK * rate


def test_the_account_forgets_what_was_long_ago() -> None:
    account = Account(thresholds.WINDOW, 0.0)
    assert account.look() == Account(thresholds.WINDOW / 2 + 1, 0.0)


def test_now_and_then_the_model_is_asked_all_the_same() -> None:
    account = Account(1000, 0)
    assert not thresholds.may_reuse(0.0, account, 0.02, draw=thresholds.EXPLORE / 2)
    assert thresholds.may_reuse(0.0, account, 0.02, draw=thresholds.EXPLORE)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rate", [0.01, 0.03])
def test_wrong_answers_stay_below_the_bound(seed: int, rate: float) -> None:
    """Entries whose curves are drawn by chance, each asked again and again: what is given is wrong less often than the owner allows, and
    still much is given."""
    chance = random.Random(seed)
    curves = [(chance.uniform(0.6, 0.98), chance.choice([15, 40, 90])) for _ in range(40)]
    seen: list[list[Observation]] = [[] for _ in curves]
    account, prior, given_out, wrong = Account(), thresholds.make_prior(), 0, 0
    for turn in range(4000):
        if turn % 500 == 0:
            prior = thresholds.learn_prior(seen)
        entry = chance.randrange(len(curves))
        place, steepness = curves[entry]
        similarity = chance.uniform(0.7, 1.0)
        is_right = chance.random() < 1 / (1 + np.exp(-steepness * (similarity - place)))
        account = account.look()
        risk = thresholds.find_risk(similarity, seen[entry], prior)
        if thresholds.may_reuse(risk, account, rate, chance.random()):
            account = account.spend(risk)
            given_out += 1
            wrong += not is_right
        else:
            seen[entry].append((similarity, bool(is_right)))
    assert wrong / 4000 <= rate
    assert given_out / 4000 > 0.15
