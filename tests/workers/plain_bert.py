"""Compute a BERT, and what differs from it by little, in plain numpy, as a paper would write it."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def dense(w: dict[str, Any], x: Any, name: str) -> Any:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def compute_states(w: dict[str, Any], ids: list[int], layers: int, heads: int, first: int = 0) -> NDArray[np.float32]:
    """Return the last hidden states of one text, ``[tokens, hidden]``, whose positions begin at ``first``."""

    def norm(x: Any, name: str) -> Any:
        spread = np.sqrt(((x - x.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True) + 1e-12)
        return (x - x.mean(-1, keepdims=True)) / spread * w[f"{name}.weight"] + w[f"{name}.bias"]

    tables = [w.get(f"embeddings.{kind}_embeddings.weight") for kind in ("word", "position", "token_type")]
    segment = 0 if tables[2] is None else tables[2][0]
    x = norm(tables[0][ids] + tables[1][first : first + len(ids)] + segment, "embeddings.LayerNorm")
    erf, hidden = np.vectorize(math.erf), tables[0].shape[1]
    head_dim = hidden // heads
    for layer in range(layers):
        at = f"encoder.layer.{layer}"
        parts = [dense(w, x, f"{at}.attention.self.{part}") for part in ("query", "key", "value")]
        q, k, v = (part.reshape(len(ids), heads, head_dim).swapaxes(0, 1) for part in parts)
        chances = np.exp(q @ k.swapaxes(1, 2) / np.float32(math.sqrt(head_dim)))
        attended = (chances / chances.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(ids), hidden)
        x = norm(dense(w, attended, f"{at}.attention.output.dense") + x, f"{at}.attention.output.LayerNorm")
        wide = dense(w, x, f"{at}.intermediate.dense")
        wide = (wide * (1 + erf(wide / math.sqrt(2))) / 2).astype(np.float32)
        x = norm(dense(w, wide, f"{at}.output.dense") + x, f"{at}.output.LayerNorm")
    return np.asarray(x, np.float32)


def classify(
    w: dict[str, Any], ids: list[int], layers: int, heads: int, *, one: bool, first: int = 0, active: Any = np.tanh
) -> NDArray[np.float32]:
    """Return each label's score, of a model of which ``one`` label holds, or each by itself."""
    state = compute_states(w, ids, layers, heads, first)[0]
    logits = dense(w, active(dense(w, state, "pooler.dense")), "classifier")
    chances = np.exp(logits - logits.max())
    return np.asarray(chances / chances.sum() if one else 1 / (1 + np.exp(-logits)), np.float32)
