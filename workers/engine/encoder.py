"""Turn texts' token ids into vectors with a converted sentence encoder."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workers.engine.sessions import integers_add_up, open_session

FEW_TOKENS = 256
"""A batch of so many, padding included, is computed by one thread: several spend as long on waiting for each other, and other processes
want the cores."""


class OnnxEncoder:
    """Encode batches of token ids. Not thread-safe: one engine thread owns it."""

    def __init__(self, model_dir: Path, providers: Sequence[str], threads: int) -> None:
        """Load both graphs: one for batches of equal lengths, without any work for masks, and one for padded ones. Each is there twice, for
        small batches and for large ones.

        I/O: reads the model's files. Raises: FileNotFoundError; ValueError for eight-bit weights on a CPU that cannot add them up.
        """
        manifest = json.loads((model_dir / "manifest.json").read_text(encoding="utf-8"))
        self.dimensions = int(manifest["dimensions"])
        self.context_tokens = int(manifest["context_tokens"])
        self._vocab_size = int(manifest["vocab_size"])
        if manifest["precision"] == "int8" and not integers_add_up():
            raise ValueError(
                f"{model_dir.name} of {manifest['name']} holds eight-bit weights, whose sums overflow on this CPU; "
                "convert it with precision fp32"
            )
        # Basic: further fusions would put the slow operators back that the converter avoids.
        graphs = (model_dir / "model.onnx", model_dir / "model.padded.onnx")
        self._large = [open_session(graph, providers, threads, optimize="basic") for graph in graphs]
        self._small = self._large
        if threads != 1 and "CUDAExecutionProvider" not in providers:
            self._small = [open_session(graph, providers, 1, optimize="basic") for graph in graphs]

    def check(self, text: Sequence[int]) -> str | None:
        """Say what is wrong with a text that cannot be encoded."""
        if not 1 <= len(text) <= self.context_tokens:
            return f"has {len(text)} tokens; the model takes 1 to {self.context_tokens}. Split or cut it"
        if min(text) < 0 or max(text) >= self._vocab_size:
            return f"has a token id outside 0 to {self._vocab_size - 1}; tokenize with the model's own tokenizer"
        return None

    def encode(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return float32 ``[n, dimensions]``, in the input's order; the caller owns it. Each text must have passed `check`."""
        if not batch:
            return np.empty((0, self.dimensions), np.float32)
        lengths = np.array([len(text) for text in batch], np.int32)
        longest = int(lengths.max())
        token_ids = np.zeros((len(batch), longest), np.int64)
        for row, text in enumerate(batch):
            token_ids[row, : len(text)] = text
        vectors: NDArray[np.float32]
        even, padded = self._small if token_ids.size <= FEW_TOKENS else self._large
        if int(lengths.min()) == longest:
            [vectors] = even.run(["sentence_embedding"], {"input_ids": token_ids})
        else:
            inputs = {"input_ids": token_ids, "lengths": lengths}
            [vectors] = padded.run(["sentence_embedding"], inputs)
        return vectors

    def close(self) -> None:
        """Give the memory back. The encoder is of no use afterwards."""
        del self._large, self._small
