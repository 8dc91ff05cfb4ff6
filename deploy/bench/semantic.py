"""Measure the semantic cache: how many questions it answers, and how many of them wrongly, beside one threshold for all.

    make bench-semantic

The questions are those of chatterbot-corpus (fetched, not installed), each in five wordings, in an order by chance; an answer is right when
it is the corpus's answer to that question. "flat" asks each wording once; "zipf" asks popular ones again and again. Embeddings and
thresholds are the ones that requests get; there is no database and no gateway here.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import yaml
from tokenizers import Tokenizer

from aiscale import env
from apps.inference.cache import thresholds
from apps.inference.cache.thresholds import NEAR, Account
from workers.artifacts import build
from workers.engine.encoder import OnnxEncoder

MODEL = "all-minilm-l6-v2"
DATA = "chatterbot-corpus==1.3.3"
LEARN_EVERY = 150
"""Look-ups; in the service it is a minute."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models-dir", type=Path, default=env.load().models_dir)
    parser.add_argument("--requests", type=int, default=8000, help="of the zipf stream")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        questions = word(read_corpus(Path(folder)))
    vectors = embed(options.models_dir, [text for text, _ in questions])
    answers = [answer for _, answer in questions]
    order = np.random.default_rng(9).permutation(len(questions))
    weights = 1 / np.arange(1, len(questions) + 1) ** 0.9
    zipf = np.random.default_rng(2).choice(order, size=options.requests, p=weights / weights.sum())
    print(
        f"{len(questions)} wordings of {len(set(answers))} answers; errors are of all questions, as the owner's bound is"
    )
    print(f"{'stream':>6} {'policy':>18} {'hits':>7} {'errors':>7} {'entries':>8} {'us each':>8}")
    for name, stream in (("flat", range(len(questions))), ("zipf", zipf)):
        for threshold in (0.8, 0.85, 0.9, 0.95):
            show(name, f"threshold {threshold}", *run(stream, vectors, answers, Threshold(threshold)))
        for bound in (0.005, 0.01, 0.02, 0.03, 0.05):
            show(name, f"bound {bound:.1%}", *run(stream, vectors, answers, Learned(bound)))


def show(stream, policy, hits, errors, entries, us):
    print(f"{stream:>6} {policy:>18} {hits:>7.1%} {errors:>7.2%} {entries:>8} {us:>8.0f}")


class Threshold:
    """Give the nearest answer from one similarity on."""

    def __init__(self, least):
        self._least = least

    def decide(self, similarity, _observations, _all):
        return similarity >= self._least


class Learned:
    """Decide as the service does."""

    def __init__(self, bound):
        self._bound, self._account, self._prior = bound, Account(), thresholds.make_prior()
        self._chance = random.Random(5)  # noqa: S311

    def decide(self, similarity, observations, everything):
        if self._account.lookups % LEARN_EVERY == 0:
            self._prior = thresholds.learn_prior(everything[-500:])
        self._account = self._account.look()
        if similarity < NEAR:
            return False
        risk = thresholds.find_risk(similarity, observations, self._prior)
        given = thresholds.may_reuse(risk, self._account, self._bound, self._chance.random())
        if given:
            self._account = self._account.spend(risk)
        return given


def run(stream, vectors, answers, policy):
    """Ask one question after the other; return the share of hits, of errors, the entries, and microseconds for each decision."""
    entries = np.zeros((len(vectors), vectors.shape[1]), np.float32)
    kept, seen, hits, errors, seconds = [], [], 0, 0, 0.0
    for number in stream:
        vector, answer = vectors[number], answers[number]
        if kept:
            alike = entries[: len(kept)] @ vector
            nearest = int(alike.argmax())
            similarity = min(float(alike[nearest]), 1.0)
            started = time.perf_counter()
            given = policy.decide(similarity, seen[nearest], seen)
            seconds += time.perf_counter() - started
            is_right = kept[nearest] == answer
            if given:
                hits += 1
                errors += not is_right
                continue
            if similarity >= NEAR:
                seen[nearest].append((similarity, is_right))
                if is_right:
                    continue
        if len(kept) == len(entries):
            entries = np.concatenate([entries, np.zeros_like(entries)])
        entries[len(kept)] = vector
        kept.append(answer)
        seen.append([])
    return hits / len(stream), errors / len(stream), len(kept), seconds / len(stream) * 1e6


def read_corpus(folder):
    """Return the corpus's English questions with their answers."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), DATA]
    subprocess.run(command, check=True)
    [wheel] = folder.glob("chatterbot*.whl")
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if "/english/" in name and name.endswith(".yml"):
                for conversation in yaml.safe_load(archive.read(name)).get("conversations", []):
                    if len(conversation) >= 2:
                        found.setdefault(str(conversation[0]).strip(), str(conversation[1]).strip().lower())
    return found


def word(found):
    """Return five wordings of each question, with its answer, in an order by chance."""
    chance = random.Random(3)  # noqa: S311
    stream = []
    for question, answer in found.items():
        bare = question.rstrip("?.! ")
        low = bare[:1].lower() + bare[1:]
        ways = [question, bare.lower(), f"Hi! {bare}?", f"Please tell me: {low}?", f"{bare}? Thanks!"]
        ways += [f"I would like to know {low}.", f"Can you help me? {bare}", f"quick question, {low}"]
        words = bare.split()
        if len(words) > 3:
            # a slip of the finger
            at = chance.randrange(len(words) - 1)
            words[at] = words[at][:1] + words[at][2:] if len(words[at]) > 3 else words[at]
            ways.append(" ".join(words))
        stream += [(way, answer) for way in chance.sample(ways, 5)]
    chance.shuffle(stream)
    return stream


def embed(models_dir, texts):
    [manifest] = build.ensure(models_dir, [MODEL])
    folder = models_dir / MODEL / manifest.version
    encoder = OnnxEncoder(folder, ["CPUExecutionProvider"], 0)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    ids = [encoding.ids[: manifest.context_tokens] for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate([encoder.encode(ids[start : start + 128]) for start in range(0, len(ids), 128)])


if __name__ == "__main__":
    main()
