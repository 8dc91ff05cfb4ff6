"""Run a float graph over a sample of text, and sum up what its products are fed with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

SAMPLE = Path(__file__).with_name("sample.txt")
"""Short texts of many kinds, a paragraph each: for calibration and for quality reports."""
_MIXED, _MIXED_WORDS, _ALONE, _MARKS = 80, 40, 300, ".?!-=*#/"


@dataclass(frozen=True)
class Observed:
    """Sum up the inputs ``x`` of one site: each channel's least and largest value, float32 ``[in]``, and ``moment``, the mean of
    ``x x^T``, ``[in, in]``."""

    lows: NDArray[np.float32]
    highs: NDArray[np.float32]
    moment: NDArray[np.float64]


def observe(graph: Path, sites: Mapping[str, str], sample: list[list[int]]) -> dict[str, Observed]:
    """Run ``graph`` on each text of ``sample``; ``sites`` names the outputs to watch, each ``[rows, features]``.

    I/O: reads the graph; some seconds of CPU.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    names = list(dict.fromkeys(sites.values()))
    rows: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    for ids in sample:
        for name, value in zip(names, session.run(names, {"input_ids": np.array([ids], np.int64)}), strict=True):
            rows[name].append(value)
    return {site: _sum_up(np.concatenate(rows[name])) for site, name in sites.items()}


def _sum_up(rows: NDArray[np.float32]) -> Observed:
    return Observed(rows.min(axis=0), rows.max(axis=0), (rows.T @ rows / len(rows)).astype(np.float64))


def read_sample(tokenizer: Path, context_tokens: int) -> list[list[int]]:
    """Return the shipped texts as token ids of a ``tokenizer.json``: paragraphs, sentences, their words in random order and one
    by one, and runs of punctuation marks.

    All but the first are cheap variety: more contexts for the same words. Equal at each call. I/O: two files.
    """
    paragraphs = SAMPLE.read_text(encoding="utf-8").strip().split("\n\n")
    sentences = [sentence for paragraph in paragraphs for sentence in paragraph.split(". ")]
    words, order = " ".join(paragraphs).split(), np.random.default_rng(0)
    mixed = [" ".join(words[place] for place in order.integers(len(words), size=_MIXED_WORDS)) for _ in range(_MIXED)]
    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.no_padding()
    encoder.no_truncation()
    alone = [*dict.fromkeys(words)][:_ALONE] + [mark * count for mark in _MARKS for count in (1, 3, 20)]
    encoded = encoder.encode_batch([*paragraphs, *sentences, *mixed, *alone])
    # what has none of a vocabulary's letters has no tokens
    return [encoding.ids[:context_tokens] for encoding in encoded if encoding.ids]
