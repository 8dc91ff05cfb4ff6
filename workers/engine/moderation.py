"""Say how toxic a text is, and whether it attacks a model: two small classifiers over the same texts.

Texts come as the code points of their characters. Each of the labels gets a score from 0 to 1; the manifest says from which on it holds.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workers.engine.phrases import Phrases, list_windows
from workers.engine.sessions import open_session

_LAST_CODE_POINT = 0x10FFFF


class ModerationEncoder:
    """Classify batches of texts. Not thread-safe: one engine thread owns it."""

    def __init__(self, model_dir: Path, providers: Sequence[str], threads: int) -> None:
        """I/O: reads the model's files. Raises: FileNotFoundError."""
        manifest = json.loads((model_dir / "manifest.json").read_text(encoding="utf-8"))
        settings = json.loads((model_dir / "moderation.json").read_text(encoding="utf-8"))
        self.labels: list[str] = manifest["labels"]
        self.context_tokens = int(manifest["context_tokens"])
        self._attack_threshold = float(manifest["thresholds"][-1])
        self._window_threshold = max(float(settings["window_threshold"]), self._attack_threshold)
        self._words = {word: number for number, word in enumerate(settings["words"], 1)}
        self._spaces = str.maketrans(dict.fromkeys(settings["separators"], " "))
        self._longest = int(settings["longest"])
        ranges = np.array(settings["ranges"], np.float32)
        self._lowest, self._span = ranges[:, 0], ranges[:, 1] - ranges[:, 0]
        self._network = open_session(
            model_dir / "toxicity.onnx", providers, threads if "CUDAExecutionProvider" in providers else 1
        )
        self._benign = int(settings["benign"])
        terms = settings["terms"]
        with np.load(model_dir / "attacks.npz", allow_pickle=False) as arrays:
            self._phrases = Phrases(
                terms["word"]["terms"],
                tuple(terms["word"]["ngrams"]),
                terms["char"]["terms"],
                tuple(terms["char"]["ngrams"]),
                **{name: arrays[name] for name in ("idf", "coefficients", "intercept")},
            )

    def check(self, text: Sequence[int]) -> str | None:
        """Say what is wrong with a text that cannot be classified."""
        if not 1 <= len(text) <= self.context_tokens:
            return f"has {len(text)} characters; the model takes 1 to {self.context_tokens}. Split or cut it"
        return None if min(text) >= 0 and max(text) <= _LAST_CODE_POINT else "holds something that is no character"

    def encode(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return float32 ``[n, labels]``; the caller owns it."""
        texts = ["".join(map(chr, text)) for text in batch]
        return np.concatenate([self._score_toxicity(texts), self._score_attacks(texts)], axis=1)

    def close(self) -> None:
        """Give the memory back. The encoder is of no use afterwards."""
        del self._network, self._phrases

    def _score_toxicity(self, texts: list[str]) -> NDArray[np.float32]:
        """Run the network over each text's known words, in windows of the length it was trained with, and keep the highest scores."""
        owners: list[int] = []
        rows: list[NDArray[np.int64]] = []
        for owner, text in enumerate(texts):
            for window in self._cut(text):
                owners.append(owner)
                rows.append(window)
        scores: NDArray[np.float32]
        [scores] = self._network.run(["scores"], {"word_ids": np.stack(rows)})
        highest = np.zeros((len(texts), scores.shape[1]), np.float32)
        np.maximum.at(highest, owners, np.clip((scores - self._lowest) / self._span, 0.0, 1.0))
        return highest

    def _cut(self, text: str) -> Iterable[NDArray[np.int64]]:
        """Yield windows of word numbers, zeros on the left; one of zeros alone for a text without a known word."""
        numbers = [
            number for word in text.lower().translate(self._spaces).split(" ") if (number := self._words.get(word))
        ]
        for start in range(0, max(len(numbers), 1), self._longest):
            window = np.zeros(self._longest, np.int64)
            part = numbers[start : start + self._longest]
            window[self._longest - len(part) :] = part
            yield window

    def _score_attacks(self, texts: list[str]) -> NDArray[np.float32]:
        return np.stack([np.delete(self._score_attack(text), self._benign) for text in texts])

    def _score_attack(self, text: str) -> NDArray[np.float32]:
        """Return each class's score; that of the likeliest attack is the chance that it is any attack at all.

        A window outweighs the whole text only when it is surer than a whole text must be.
        """
        best = self._phrases.score(text)
        for window in list_windows(text):
            scores = self._phrases.score(window)
            if 1 - scores[self._benign] >= max(self._window_threshold, 1 - best[self._benign]):
                best = scores
        likeliest = int(np.argmax(np.where(np.arange(len(best)) == self._benign, -1.0, best)))
        best[likeliest] = 1 - best[self._benign]
        return best
