"""Measure what a conversion cost: perplexity, and how often the next token is the one that fp32 would say, on the shipped texts."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from aiscale.wire.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest
from workers.artifacts.calibration import SAMPLE
from workers.artifacts.errors import ConversionError
from workers.engine.providers import CPU
from workers.engine.runner import Chunk
from workers.engine.runner_onnx import OnnxRunner
from workers.engine.sessions import open_session

TEXT_TOKENS, TEXTS = 64, 12
LEAST_COSINE = 0.999
"""Below it, vectors are not as good as those of fp32."""
MOST_MORE_PERPLEXITY = 0.05
"""Than fp32's, as a share of it. Above that, people notice that answers are worse."""


@dataclass(frozen=True)
class Quality:
    """Hold what was measured over ``tokens`` predictions. The comparison is None where there was no fp32 graph to compare with."""

    tokens: int
    perplexity: float
    fp32_perplexity: float | None = None
    greedy_agreement: float | None = None
    divergence: float | None = None
    """Mean KL divergence from fp32, in nats."""

    def describe(self) -> list[str]:
        """Return lines for whoever imports the model, with advice where it lost much."""
        if not self.tokens:
            return ["quality: not measured; the shipped texts have no tokens in this vocabulary"]
        line = f"quality: perplexity {self.perplexity:.4g} over {self.tokens} tokens of the shipped texts"
        if self.fp32_perplexity is None or self.greedy_agreement is None or self.divergence is None:
            return [line]
        line += f", fp32 {self.fp32_perplexity:.4g}; the likeliest token is fp32's for {self.greedy_agreement:.1%}; "
        lines = [f"{line}divergence {self.divergence:.4f} nats"]
        more = self.perplexity / self.fp32_perplexity - 1
        if more > MOST_MORE_PERPLEXITY:
            lines.append(
                f"that is {more:.0%} more perplexity than fp32's: where answers must be as good, take a wider --quantize"
            )
        return lines


def measure(directory: Path, manifest: Manifest, fp32_directory: Path | None = None) -> Quality:
    """Run the shipped texts through a generator, and through its fp32 graph if that is given.

    I/O: loads the graphs; some seconds of CPU. Raises: ConversionError for a graph that cannot run, or makes no numbers.
    """
    losses: list[NDArray[np.float64]] = []
    fp32_losses: list[NDArray[np.float64]] = []
    same: list[NDArray[np.bool_]] = []
    divergences: list[NDArray[np.float64]] = []
    texts = _read_texts(directory / TOKENIZER_FILE, min(TEXT_TOKENS, manifest.context_tokens))
    try:
        for text, logprobs, reference in _run(directory, manifest, fp32_directory, texts):
            rows, following = np.arange(len(text) - 1), np.array(text[1:])
            losses.append(-logprobs[rows, following])
            if reference is not None:
                fp32_losses.append(-reference[rows, following])
                same.append(logprobs.argmax(axis=1) == reference.argmax(axis=1))
                divergences.append((np.exp(reference) * (reference - logprobs)).sum(axis=1))
    except ConversionError:
        raise
    except Exception as error:  # ONNX Runtime raises classes of its own for each status
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConversionError(f"the model's graph cannot run: {reason}") from error
    if not losses:
        return Quality(0, float("nan"))
    lost = np.concatenate(losses)
    if not fp32_losses:
        return Quality(len(lost), _perplexity(lost))
    return Quality(
        tokens=len(lost),
        perplexity=_perplexity(lost),
        fp32_perplexity=_perplexity(np.concatenate(fp32_losses)),
        greedy_agreement=float(np.concatenate(same).mean()),
        divergence=float(np.concatenate(divergences).mean()),
    )


def run_encoder(graph: Path, texts: list[list[int]]) -> NDArray[np.float32]:
    """Run the graph of an encoder or classifier for equal lengths over each text. I/O: reads the graph; seconds of CPU.

    Raises: ConversionError for a graph that cannot run, or makes no numbers.
    """
    try:
        session = open_session(graph, [CPU], 0, optimize="basic")
        rows = [session.run(None, {"input_ids": np.array([text], np.int64)})[0][0] for text in texts]
    except Exception as error:  # ONNX Runtime raises classes of its own for each status
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConversionError(f"the model's graph cannot run: {reason}") from error
    found = np.stack(rows)
    if not np.isfinite(found).all():
        raise ConversionError(
            "the model makes no finite numbers: its weights are damaged, or too wide for this precision"
        )
    return found


def compare_directions(rows: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine of each row with the other's, float64 ``[n]``."""
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    found: NDArray[np.float64] = (rows.astype(np.float64) * others).sum(axis=1) / np.maximum(lengths, 1e-12)
    return found


def _run(
    directory: Path, manifest: Manifest, fp32_directory: Path | None, texts: list[list[int]]
) -> Iterator[tuple[list[int], NDArray[np.float64], NDArray[np.float64] | None]]:
    """Yield each text with its log probabilities ``[tokens - 1, vocab]``, and fp32's."""
    with closing(_open(directory, manifest)) as runner:
        reference = (
            None
            if fp32_directory is None
            else _open(fp32_directory, msgspec.structs.replace(manifest, precision="fp32"))
        )
        try:
            for text in texts:
                yield text, _logprobs(runner, text), None if reference is None else _logprobs(reference, text)
        finally:
            if reference is not None:
                reference.close()


def _open(directory: Path, manifest: Manifest) -> OnnxRunner:
    # what the runner reads; the sealed one comes later
    (directory / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))
    return OnnxRunner(directory, slots=1, context_tokens=TEXT_TOKENS, providers=[CPU], threads=0)


def _logprobs(runner: OnnxRunner, text: list[int]) -> NDArray[np.float64]:
    logits = runner.compute([Chunk(0, text, 0)], every=True)[:-1].astype(np.float64)
    runner.release(0)
    if not np.isfinite(logits).all():
        raise ConversionError(
            "the model's logits are not finite: its weights are damaged, or too wide for this precision"
        )
    logits -= logits.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return found


def _read_texts(tokenizer: Path, most_tokens: int) -> list[list[int]]:
    encoder = Tokenizer.from_file(str(tokenizer))
    paragraphs = SAMPLE.read_text(encoding="utf-8").strip().split("\n\n")
    encoded = [encoding.ids[:most_tokens] for encoding in encoder.encode_batch(paragraphs, add_special_tokens=False)]
    return [ids for ids in encoded if len(ids) > 1][:TEXTS]


def _perplexity(losses: NDArray[np.float64]) -> float:
    return float(np.exp(min(float(losses.mean()), 700.0)))
