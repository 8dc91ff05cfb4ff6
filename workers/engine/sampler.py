"""Choose the next token of each sequence in a batch.

Work that touches the whole vocabulary is done for all rows at once; what only some rows ask for, on a few likely tokens of
each. What a row gets never depends on its neighbours, so equal seeds give equal tokens in any company.
"""

import logging
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.engine.sequence import Logprob, Params, Sequence

log = logging.getLogger(__name__)

NOT_FINITE = "the model's logits are not finite"
COLDEST = 1e-3
"""Temperatures below this (0 apart, which is greedy) would overflow; the likeliest token wins there anyway."""
_LIKELY = np.float32(2.0**-14)
"""Filters look first at the tokens at least this likely, relative to the likeliest: some dozens, usually."""
_BLOCK = 256
_SEED_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Chosen:
    """Be one row's next token; ``error`` says why there is none."""

    token_id: int
    logprob: Logprob | None = None
    error: str | None = None


def make_rng(seed: int | None, choice: int) -> np.random.Generator:
    """Return a choice's own generator. Equal seeds draw equally; choices of one request differ."""
    if seed is None:
        return np.random.default_rng()
    return np.random.default_rng(seed & _SEED_MASK if choice == 0 else [seed & _SEED_MASK, choice])


def choose(logits: NDArray[np.float32], sequences: Rows[Sequence]) -> list[Chosen]:
    """Choose a token for each row of ``[n, vocab]``. The logits are overwritten."""
    best = logits.argmax(axis=1)
    peaks = logits[np.arange(len(sequences)), best]
    finite = np.isfinite(peaks)
    logprobs = [
        None if s.params.top_logprobs is None or not ok else _Told(row, peak, s.params.top_logprobs)
        for row, peak, ok, s in zip(logits, peaks, finite, sequences, strict=True)
    ]
    errors = {at: NOT_FINITE for at, ok in enumerate(finite) if not ok}
    for at, sequence in enumerate(sequences):
        if finite[at] and sequence.changes_logits:
            try:
                _change(logits[at], sequence)
                best[at] = logits[at].argmax()
                peaks[at] = logits[at, best[at]]
                if not np.isfinite(peaks[at]):
                    errors[at] = "no token is allowed here"
            except Exception as error:
                # it is this row's own: a grammar that cannot go on, a token that does not exist
                log.exception("a row's logits could not be changed", extra={"job_id": sequence.job_id})
                errors[at] = f"the model could not go on ({type(error).__name__})"
    drawn = [at for at, s in enumerate(sequences) if at not in errors and s.params.temperature > 0.0]
    if drawn:
        _draw_all(logits, peaks, best, drawn, sequences)
    chosen = []
    for at, told in enumerate(logprobs):
        if at in errors:
            chosen.append(Chosen(-1, error=errors[at]))
        else:
            token_id = int(best[at])
            chosen.append(Chosen(token_id, None if told is None else told.of(token_id)))
    return chosen


class _Told:
    """Keep what the model thought of a row's tokens before filters change it."""

    def __init__(self, logits: NDArray[np.float32], peak: np.float32, count: int) -> None:
        self._logits = logits.copy()
        shares = np.exp(self._logits - peak)
        self._total = float(peak) + float(np.log(np.add.reduce(shares, dtype=np.float64)))
        likely = np.flatnonzero(shares >= _LIKELY)
        if len(likely) < count:
            likely = np.arange(len(shares))
        order = likely[np.argsort(-self._logits[likely], kind="stable")[:count]]
        self._top = tuple((int(token), float(self._logits[token]) - self._total) for token in order)

    def of(self, token_id: int) -> Logprob:
        return Logprob(token_id=token_id, value=float(self._logits[token_id]) - self._total, top=self._top)


def _change(row: NDArray[np.float32], sequence: Sequence) -> None:
    """Apply penalties, bias and grammar to one row, in place."""
    params = sequence.params
    if params.repetition_penalty != 1.0:
        seen = sequence.seen.ids
        values = row[seen]
        factor = np.float32(params.repetition_penalty)
        row[seen] = np.where(values > 0, values / factor, values * factor)
    if params.presence_penalty or params.frequency_penalty:
        made = sequence.made
        row[made.ids] -= params.frequency_penalty * made.counts + np.float32(params.presence_penalty)
    if params.bias is not None:
        ids, values = params.bias
        row[ids] += values
    if sequence.matcher is not None:
        row[sequence.matcher.list_forbidden()] = -np.inf


def _draw_all(
    logits: NDArray[np.float32],
    peaks: NDArray[np.float32],
    best: NDArray[np.int64],
    rows: list[int],
    sequences: Rows[Sequence],
) -> None:
    """Replace ``best`` by a draw in each of ``rows``."""
    heats = np.array([max(sequences[at].params.temperature, COLDEST) for at in rows], np.float32)
    shares = np.exp((logits[rows] - peaks[rows, None]) / heats[:, None])
    for share, at in zip(shares, rows, strict=True):
        best[at] = _draw(share, sequences[at].params, sequences[at].rng.random())


def _draw(shares: NDArray[np.float32], params: Params, point: float) -> int:
    """Draw one token id from ``[vocab]`` chances relative to the likeliest's; ``point`` is uniform in [0, 1)."""
    if not (params.top_k or params.top_p < 1.0 or params.min_p > 0.0):
        return _pick(shares, point)
    likely = np.flatnonzero(shares >= _LIKELY)
    kept = _filter(shares, likely, params)
    if kept is None:
        kept = _filter(shares, np.flatnonzero(shares > 0), params, everything=True)
        assert kept is not None
    return int(kept[_pick(shares[kept], point)])


def _filter(
    shares: NDArray[np.float32], tokens: NDArray[np.int64], params: Params, everything: bool = False
) -> NDArray[np.int64] | None:
    """Return those of ``tokens`` that pass, likeliest first; None when ``tokens`` are too few to tell."""
    if params.top_k and len(tokens) < params.top_k and not everything:
        return None
    order = tokens[np.argsort(-shares[tokens], kind="stable")]
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1.0:
        running = np.cumsum(shares[order], dtype=np.float64)
        whole = running[-1] if params.top_k or everything else float(np.add.reduce(shares, dtype=np.float64))
        goal = params.top_p * whole
        if running[-1] < goal and not everything:
            return None
        order = order[: int(np.searchsorted(running, goal)) + 1]
    if params.min_p > 0.0:
        if not everything and params.min_p < _LIKELY and not params.top_k and params.top_p >= 1.0:
            return None
        order = order[: max(int(np.count_nonzero(shares[order] >= params.min_p)), 1)]
    return order


def _pick(shares: NDArray[np.float32], point: float) -> int:
    """Return the place at which the running sum of ``shares`` passes ``point`` of the whole."""
    starts = np.arange(0, len(shares), _BLOCK)
    running = np.cumsum(np.add.reduceat(shares, starts), dtype=np.float64)
    goal = point * running[-1]
    block = min(int(np.searchsorted(running, goal, side="right")), len(starts) - 1)
    inside = shares[starts[block] : starts[block] + _BLOCK]
    before = running[block - 1] if block else 0.0
    steps = before + np.cumsum(inside, dtype=np.float64)
    place = int(np.searchsorted(steps, goal, side="right"))
    if place >= len(inside):  # the sums of a block and of its parts differ in the last bit
        place = int(np.flatnonzero(inside)[-1])
    return int(starts[block]) + place
