"""Learn, for each semantically cached answer, how like a prompt must be to deserve it; with a bound on the rate of wrong answers.

In the manner of vCache (Schroeder et al., arXiv 2502.03771): each entry remembers for which similarities its answer proved right or
wrong. The chance that it is right at a similarity is modelled as a logistic curve; its place and steepness are not known, so they have a
posterior over a grid. Two things are added. What the other entries of an organization learned is the prior (learned by expectation
maximization), so that a new entry need not begin from nothing. And the owner's bound is kept as an account: each reuse spends its
risk, and no reuse may spend more than the account holds, so that wrong answers stay below the bound times the number of
look-ups in expectation, also when many come at once.

Pure arithmetic: no I/O.
"""

from collections.abc import Sequence
from functools import cache

import msgspec
import numpy as np
from numpy.typing import NDArray

NEAR = 0.7
"""What is less alike than this has nothing to do with the entry: it is neither given its answer nor compared with it."""
MAX_OBSERVATIONS = 64
"""The latest ones of an entry; what it learned is in them."""
EXPLORE = 0.02
"""How often the model is asked although the cached answer would do: what has become wrong is noticed."""
MOST_RISK = 6.0
"""The risk of one reuse is at most so many times the bound, however much the account holds."""
SPREAD = 0.02
"""One reuse may spend what is free divided by this part of all look-ups (by `SPREAD_LEAST` at least): so it never spends it all at once."""
SPREAD_LEAST = 10.0
WINDOW = 20_000.0
"""Look-ups after which the account forgets half: what was saved up long ago does not pay for a bad day."""

_PLACES = np.linspace(0.40, 1.10, 71)
_STEEPNESS = np.array([8.0, 15.0, 25.0, 40.0, 60.0, 90.0])
_PRIOR_PLACE, _PRIOR_SPREAD = 0.92, 0.10
"""Before anything is known an answer is right only for prompts that are nearly the same: so an entry begins by asking the model."""
_PRIOR_ENTRIES = 3.0
"""How many entries' word the first prior has beside those that were seen."""
_ROUNDS = 8

Observation = tuple[float, bool]
"""(cosine similarity of the prompt, whether the cached answer was right for it)."""
Grid = NDArray[np.float64]
"""Weights that sum to 1, or chances, ``[places, steepness]``."""


class Account(msgspec.Struct, frozen=True):
    """Hold how often an organization looked, and the risk that its reuses took: how many wrong answers are to be expected."""

    lookups: float = 0.0
    spent: float = 0.0

    def look(self) -> "Account":
        """Return the account with one more look-up."""
        lookups, spent = (self.lookups, self.spent) if self.lookups < WINDOW else (self.lookups / 2, self.spent / 2)
        return Account(lookups + 1, spent)

    def spend(self, risk: float) -> "Account":
        return Account(self.lookups, self.spent + risk)


def may_reuse(risk: float, account: Account, max_error_rate: float, draw: float) -> bool:
    """Tell whether the cached answer is given: its risk is one that the account can pay, and this is no exploration.

    ``account`` has this look-up in it; ``draw`` is from 0 to 1, by chance.
    """
    return draw >= EXPLORE and risk <= find_allowance(account, max_error_rate)


def find_allowance(account: Account, max_error_rate: float) -> float:
    """Return the most that one reuse may risk now. Never more than what is free: the account is never overdrawn."""
    free = max(max_error_rate * account.lookups - account.spent, 0.0)
    return min(MOST_RISK * max_error_rate, free / max(SPREAD_LEAST, SPREAD * account.lookups))


def find_risk(similarity: float, observations: Sequence[Observation], prior: Grid) -> float:
    """Return the chance that the cached answer is wrong for a prompt of this similarity, by all that is known of the entry."""
    logs = np.log(prior + 1e-12) + _weigh(observations)
    weights = np.exp(logs - logs.max())
    return float(1.0 - (weights * _curve(similarity)).sum() / weights.sum())


def find_threshold(observations: Sequence[Observation], prior: Grid, max_error_rate: float) -> float | None:
    """Return from which similarity on (in hundredths) an entry's answer may be given at all; None when for no prompt, however alike."""
    for hundredths in range(round(NEAR * 100), 101):
        if find_risk(hundredths / 100, observations, prior) <= MOST_RISK * max_error_rate:
            return hundredths / 100
    return None


def learn_prior(entries: Sequence[Sequence[Observation]]) -> Grid:
    """Return how curves are spread over the entries that were observed, the first prior with the word of a few."""
    base = make_prior()
    seen = [_weigh(observations) for observations in entries if observations]
    if not seen:
        return base
    likelihoods = np.stack([np.exp(logs - logs.max()) for logs in seen])
    prior = base
    for _ in range(_ROUNDS):
        posteriors = likelihoods * prior
        posteriors /= posteriors.sum((1, 2), keepdims=True)
        prior = (posteriors.sum(0) + _PRIOR_ENTRIES * base) / (len(seen) + _PRIOR_ENTRIES)
    return prior


def pack_prior(prior: Grid) -> bytes:
    return prior.astype("<f4").tobytes()


def unpack_prior(data: bytes) -> Grid:
    """Return a packed prior; the first one for what is none of this grid."""
    if len(data) != 4 * len(_PLACES) * len(_STEEPNESS):
        return make_prior()
    return np.frombuffer(data, "<f4").astype(np.float64).reshape(len(_PLACES), len(_STEEPNESS))


@cache
def make_prior() -> Grid:
    """Return what is believed of an entry before anything was seen."""
    place = np.exp(-0.5 * ((_PLACES - _PRIOR_PLACE) / _PRIOR_SPREAD) ** 2)
    prior: Grid = np.repeat(place[:, None], len(_STEEPNESS), axis=1)
    prior /= prior.sum()
    prior.setflags(write=False)
    return prior


def _weigh(observations: Sequence[Observation]) -> Grid:
    """Return the logarithm of each curve's likelihood."""
    latest = observations[-MAX_OBSERVATIONS:]
    if not latest:
        return np.zeros((len(_PLACES), len(_STEEPNESS)))
    chances = _curve(np.array([similarity for similarity, _ in latest]))
    right = np.array([is_right for _, is_right in latest])
    logs: Grid = np.log(np.clip(np.where(right, chances, 1.0 - chances), 1e-9, 1.0)).sum(-1)
    return logs


def _curve(similarity: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return P(right) for every (place, steepness) of the grid: ``[places, steepness]``, or with one more axis for several."""
    given = np.asarray(similarity)
    places, steepness = (_PLACES[:, None], _STEEPNESS[None, :])
    if given.ndim:
        places, steepness = places[..., None], steepness[..., None]
    chances: NDArray[np.float64] = 1.0 / (1.0 + np.exp(np.clip(-steepness * (given - places), -60, 60)))
    return chances
