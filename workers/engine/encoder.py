"""Turn texts' token ids into vectors with a converted sentence encoder."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workers.engine.sessions import open_session


class OnnxEncoder:
    """Encode batches of token ids. Not thread-safe: one engine thread owns it."""

    def __init__(
        self,
        model_dir: Path,
        providers: Sequence[str],
        threads: int,
        max_batch: int = 32,
        max_batch_tokens: int = 2048,
    ) -> None:
        """Load the graph. ``max_batch_tokens`` bounds a batch with its padding: rows times the longest.

        I/O: reads the model's files. Raises: FileNotFoundError; ValueError for a bound below 1.
        """
        if max_batch < 1 or max_batch_tokens < 1:
            raise ValueError(f"a batch needs a text and a token; the bounds are {max_batch} and {max_batch_tokens}")
        manifest = json.loads((model_dir / "manifest.json").read_text(encoding="utf-8"))
        self.dimensions = int(manifest["dimensions"])
        self.context_tokens = int(manifest["context_tokens"])
        self._vocab_size = int(manifest["vocab_size"])
        self._max_batch = max_batch
        self._max_batch_tokens = max_batch_tokens
        self._session = open_session(model_dir / "model.onnx", providers, threads)

    def encode(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return float32 ``[n, dimensions]``, each row of length 1, in the input's order; the caller owns it.

        Texts of like length share a call, so that little is padded. Raises: ValueError for an empty or too long text, or
        a token id outside the vocabulary.
        """
        for index, text in enumerate(batch):
            if not 1 <= len(text) <= self.context_tokens:
                raise ValueError(
                    f"text {index} has {len(text)} tokens; the model takes 1 to {self.context_tokens}. Split or cut it"
                )
        vectors = np.empty((len(batch), self.dimensions), np.float32)
        for part in self._batches(batch):
            vectors[part] = self._run([batch[index] for index in part])
        return vectors

    def close(self) -> None:
        """Give the memory back. The encoder is of no use afterwards."""
        del self._session

    def _batches(self, batch: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Yield the indexes of texts that go together, shortest first; a text over the budget goes alone."""
        part: list[int] = []
        for index in sorted(range(len(batch)), key=lambda index: len(batch[index])):
            # Sorted: the newcomer is the longest, and sets the padded length of all.
            if part and (len(part) == self._max_batch or (len(part) + 1) * len(batch[index]) > self._max_batch_tokens):
                yield part
                part = []
            part.append(index)
        if part:
            yield part

    def _run(self, texts: list[Sequence[int]]) -> NDArray[np.float32]:
        longest = max(len(text) for text in texts)
        token_ids = np.zeros((len(texts), longest), np.int64)
        mask = np.zeros((len(texts), longest), np.int64)
        for row, text in enumerate(texts):
            token_ids[row, : len(text)] = text
            mask[row, : len(text)] = 1
        if token_ids.min() < 0 or token_ids.max() >= self._vocab_size:
            raise ValueError(
                f"a token id lies outside 0 to {self._vocab_size - 1}; tokenize with the model's own tokenizer"
            )
        inputs = {"input_ids": token_ids, "attention_mask": mask}
        vectors: NDArray[np.float32] = self._session.run(["sentence_embedding"], inputs)[0]
        return vectors
