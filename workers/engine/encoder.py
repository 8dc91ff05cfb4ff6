"""Turn texts' token ids into vectors with a converted sentence encoder, or into the scores of labels with a classifier."""

import itertools
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workers.engine.sessions import open_session, refuse_overflow

FEW_TOKENS = 256
"""A batch of more, padding included, is cut into as many parts as there are threads."""


class OnnxEncoder:
    """Encode batches of token ids. Not thread-safe: one engine thread owns it."""

    def __init__(self, model_dir: Path, providers: Sequence[str], threads: int) -> None:
        """Load both graphs: one for batches of equal lengths, without any work for masks, and one for padded ones.

        On a CPU each run has one thread, and a large batch is several runs at once: threads that share a run wait for each other at each
        node, spinning, which costs up to twice the CPU. ``threads`` 0: as many as there are cores. I/O: reads the model's files.
        Raises: FileNotFoundError; ValueError for eight-bit weights on a CPU that cannot add them up.
        """
        manifest = json.loads((model_dir / "manifest.json").read_text(encoding="utf-8"))
        self.dimensions = int(manifest["dimensions"])
        self.context_tokens = int(manifest["context_tokens"])
        self._vocab_size = int(manifest["vocab_size"])
        refuse_overflow(model_dir, manifest)
        # Basic: further fusions would put the slow operators back that the converter avoids.
        on_cpu = "CUDAExecutionProvider" not in providers
        self._even, self._padded = (
            open_session(model_dir / graph, providers, 1 if on_cpu else threads, optimize="basic")
            for graph in ("model.onnx", "model.padded.onnx")
        )
        self._parts = (threads or len(os.sched_getaffinity(0))) if on_cpu else 1
        self._pool = ThreadPoolExecutor(self._parts, thread_name_prefix="encoder-part")

    def check(self, text: Sequence[int]) -> str | None:
        """Say what is wrong with a text that cannot be encoded."""
        if not 1 <= len(text) <= self.context_tokens:
            return f"has {len(text)} tokens; the model takes 1 to {self.context_tokens}. Split or cut it"
        if min(text) < 0 or max(text) >= self._vocab_size:
            return f"has a token id outside 0 to {self._vocab_size - 1}; tokenize with the model's own tokenizer"
        return None

    def encode(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return float32 ``[n, dimensions]`` (of classifiers, ``[n, labels]``), in the input's order; the caller owns it.

        Each text must have passed `check`.
        """
        if not batch:
            return np.empty((0, self.dimensions), np.float32)
        parts = min(self._parts, len(batch)) if len(batch) * max(map(len, batch)) > FEW_TOKENS else 1
        if parts == 1:
            return self._run(batch)
        # what is of one length shares a part, as far as that goes: less padding
        order = sorted(range(len(batch)), key=lambda row: len(batch[row]))
        cuts = [len(batch) * part // parts for part in range(parts + 1)]
        rows = [order[first:last] for first, last in itertools.pairwise(cuts)]
        vectors = np.empty((len(batch), self.dimensions), np.float32)
        for own, made in zip(
            rows, self._pool.map(lambda own: self._run([batch[row] for row in own]), rows), strict=True
        ):
            vectors[own] = made
        return vectors

    def _run(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        lengths = np.array([len(text) for text in batch], np.int32)
        longest = int(lengths.max())
        token_ids = np.zeros((len(batch), longest), np.int64)
        for row, text in enumerate(batch):
            token_ids[row, : len(text)] = text
        vectors: NDArray[np.float32]
        if int(lengths.min()) == longest:
            [vectors] = self._even.run(None, {"input_ids": token_ids})
        else:
            inputs = {"input_ids": token_ids, "lengths": lengths}
            [vectors] = self._padded.run(None, inputs)
        return vectors

    def close(self) -> None:
        """Give the memory back. The encoder is of no use afterwards."""
        self._pool.shutdown()
        del self._even, self._padded
