"""Choose the next token from logits."""

import numpy as np
from numpy.typing import NDArray


def sample(logits: NDArray[np.float32], temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """Draw one token id from ``[vocab]`` logits. Temperature 0 takes the likeliest; ``top_p`` keeps the smallest set of tokens
    whose chances reach it. Equal generators draw equally. Raises: FloatingPointError for logits that are not finite."""
    if not np.isfinite(logits).all():
        raise FloatingPointError("the model's logits are not finite")
    if temperature <= 0.0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / max(temperature, 1e-3)
    chances = np.exp(scaled - scaled.max())
    chances /= chances.sum()
    if top_p < 1.0:
        order = np.argsort(-chances, kind="stable")
        kept = int(np.searchsorted(np.cumsum(chances[order]), top_p)) + 1
        order = order[:kept]
        total = np.cumsum(chances[order])
        return int(order[min(int(np.searchsorted(total, rng.random() * total[-1], side="right")), kept - 1)])
    total = np.cumsum(chances)
    return int(min(int(np.searchsorted(total, rng.random() * total[-1], side="right")), len(chances) - 1))
