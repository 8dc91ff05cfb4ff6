"""Guess how an answer goes on: as the text did where the same tokens stood before (prompt look-up). Pure bookkeeping, for one sequence.

Guesses are computed together with the last token, in one call, and each is kept only if it is what would have been chosen there anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from workers.engine.sequence import Params

MATCHED = 3
"""So many tokens must have stood there before."""
MOST_GUESSES = 4
"""In one step: each is a row to compute, whether it is right or not."""
MOST_STREAMS = 2
"""With more streams the rows of guesses take what the streams need."""
_TRIED, _LEAST_RIGHT = 16, 0.4
"""After so many guesses, and from then on over about as many, fewer right ones do not pay for the wrong."""


Speculates = Literal["never", "by chance", "always"]
"""Guessed tokens are computed by other kernels, whose last bits differ. Where answers are promised to be the same in any company, only
those that are drawn by chance, without a seed, are guessed at: nobody can tell."""


def may_guess(speculates: Speculates, params: Params) -> bool:
    """Say whether a request's tokens may be guessed."""
    by_chance = params.temperature > 0 and params.seed is None
    return speculates == "always" or (speculates == "by chance" and by_chance)


class Guesser:
    """Hold one sequence's text, and whether guessing pays."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._followed_at: dict[tuple[int, ...], int] = {}
        self._tried = self._right = 0.0
        self.pays = True
        """Once it does not, it is not tried again."""
        for token_id in token_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """Take the next token of the text."""
        # what stands before it is known from now on: at the end of the text it would find itself
        if len(self._tokens) >= MATCHED:
            self._followed_at[tuple(self._tokens[-MATCHED:])] = len(self._tokens)
        self._tokens.append(token_id)

    def guess(self, most: int) -> list[int]:
        """Return what may come next, at most so many tokens, perhaps none."""
        if not self.pays or most < 1:
            return []
        at = self._followed_at.get(tuple(self._tokens[-MATCHED:]))
        return [] if at is None else self._tokens[at : at + min(most, MOST_GUESSES)]

    def learn(self, guessed: int, right: int) -> None:
        """Take note of what came of a guess."""
        self._tried, self._right = self._tried + guessed, self._right + right
        if self._tried >= _TRIED:
            self.pays = self._right >= _LEAST_RIGHT * self._tried
            self._tried, self._right = self._tried / 2, self._right / 2
