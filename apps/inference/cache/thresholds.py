"""Learn, for each semantically cached answer, how like a prompt must be to deserve it; with a bound on the rate of wrong answers.

In the manner of vCache (Schroeder et al., arXiv 2502.03771): each entry remembers for which similarities its answer proved right or
wrong. The chance that it is right at similarity s is modelled as a logistic curve; its place t and steepness g are not known, so they
have a posterior over a grid. An answer is reused only as often as the lower end of what the posterior allows keeps the chance of error
below the owner's bound; otherwise the model is asked, and the comparison is one more observation.

Pure arithmetic: no I/O.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

MAX_OBSERVATIONS = 64
"""The latest ones of an entry; what it learned is in them."""

_PLACES = np.linspace(0.40, 1.10, 71)
_STEEPNESS = np.array([8.0, 15.0, 25.0, 40.0, 60.0, 90.0])
_CONFIDENCES = np.array([0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005])
_PRIOR_PLACE, _PRIOR_SPREAD = 0.92, 0.10
"""Before anything is known an answer is right only for prompts that are nearly the same: so an entry begins by asking the model."""

Observation = tuple[float, bool]
"""(cosine similarity of the prompt, whether the cached answer was right for it)."""


def reuse_chance(similarity: float, observations: Sequence[Observation], max_error_rate: float) -> float:
    """Return with which chance the cached answer may be given, 0 to 1, so that wrong ones stay below ``max_error_rate`` in expectation.

    With the chance 1 - reuse the model is asked, which is never wrong: (1 - explore) * P(wrong) <= max_error_rate is solved for the
    lower confidence bound of P(right), at the confidence that allows most.
    """
    lower = right_bounds(similarity, observations)
    right = (1.0 - _CONFIDENCES) * lower
    explore = ((1.0 - max_error_rate) - right) / np.maximum(1.0 - right, 1e-9)
    return float(1.0 - np.clip(explore.min(), 0.0, 1.0))


def right_bounds(similarity: float, observations: Sequence[Observation]) -> NDArray[np.float64]:
    """Return lower bounds of P(right | similarity), one for each of the confidences."""
    weights = _posterior(tuple(observations[-MAX_OBSERVATIONS:]))
    chances = _curve(similarity).ravel()
    order = np.argsort(chances)
    mass = np.cumsum(weights.ravel()[order])
    places = np.minimum(np.searchsorted(mass, _CONFIDENCES), len(order) - 1)
    bounds: NDArray[np.float64] = chances[order][places]
    return bounds


def _posterior(observations: tuple[Observation, ...]) -> NDArray[np.float64]:
    logs = _prior().copy()
    for similarity, right in observations:
        chances = _curve(similarity)
        logs += np.log(np.clip(chances if right else 1.0 - chances, 1e-9, 1.0))
    weights = np.exp(logs - logs.max())
    total: NDArray[np.float64] = weights / weights.sum()
    return total


@cache
def _prior() -> NDArray[np.float64]:
    place = -0.5 * ((_PLACES - _PRIOR_PLACE) / _PRIOR_SPREAD) ** 2
    return np.repeat(place[:, None], len(_STEEPNESS), axis=1)


def _curve(similarity: float) -> NDArray[np.float64]:
    """Return P(right) for every (place, steepness) of the grid, ``[places, steepness]``."""
    exponent = np.clip(-_STEEPNESS[None, :] * (similarity - _PLACES[:, None]), -60, 60)
    chances: NDArray[np.float64] = 1.0 / (1.0 + np.exp(exponent))
    return chances
