"""Measure the encoder beside what most people run: a plain export in a plain loop, one text at a time.

    make bench-encoder

Both use the same weights, the same texts (random token ids) and ONNX Runtime's own number of threads, in one process, in alternating
rounds. "engine" is the encoder as workers run it: jobs of one text, submitted together, joined into batches.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from machine import count_bert_flops, measure_peaks
from plain_bert import PlainBert

from aiscale import env
from workers.artifacts import build
from workers.artifacts.fetch import fetch
from workers.engine.encoder import OnnxEncoder
from workers.engine.encoding import EncoderThread, EncodeTask

MODEL = "all-minilm-l6-v2"
WIDTH = 2
"""Bytes that stand for one float of the inputs (decision 0020)."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models-dir", type=Path, default=env.load().models_dir)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--texts", type=int, default=64, help="in each round")
    options = parser.parse_args()
    [manifest] = build.ensure(options.models_dir, [MODEL])
    encoder = OnnxEncoder(options.models_dir / MODEL / manifest.version, ["CPUExecutionProvider"], 0)
    with tempfile.TemporaryDirectory() as folder:
        loop, config = open_plain(Path(folder), options.models_dir)
    print(f"{MODEL} {manifest.precision}, {options.texts} texts a round, median of {options.rounds} alternating rounds")
    peaks = measure_peaks()
    print(peaks.describe())
    print(f"{'tokens':>8} {'loop, texts/s':>14} {'engine, texts/s':>16} {'engine/loop':>12} {'least cosine':>13}")
    for tokens in (16, 128):
        rates = measure(loop, encoder, tokens, options)
        flops = count_bert_flops(config, tokens)
        loop_gflops, engine_gflops = (rate * flops / 1e9 for rate in rates)
        bytes_told = (
            f", with {WIDTH} bytes multiplied for each float: {WIDTH * engine_gflops / peaks.integer_gops:.0%} of int8's"
            if manifest.precision == "int8"
            else ""
        )
        print(
            f"{'':>8} the loop's {loop_gflops:.0f} GFLOP/s are {loop_gflops / peaks.float_gflops:.0%} of fp32's peak; the engine's are "
            f"{engine_gflops:.0f}, {engine_gflops / peaks.float_gflops:.0%} of it{bytes_told}"
        )


def open_plain(folder, models_dir):
    """Export plainly and open it as anybody would: with ONNX Runtime's defaults. Returns the session and the model's configuration."""
    sources = {name: models_dir / "sources" / name for name in ("model.safetensors", "config.json")}
    if not all(path.is_file() for path in sources.values()):
        sources = fetch(build.find_model(MODEL), folder)
    path = folder / "plain.onnx"
    PlainBert(sources["model.safetensors"], sources["config.json"]).write(path)
    config = json.loads(sources["config.json"].read_text(encoding="utf-8"))
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]), config


def measure(loop, encoder, tokens, options):
    order = np.random.default_rng(tokens)
    texts = order.integers(1000, 30_000, (options.texts, tokens)).tolist()
    thread = EncoderThread(encoder)
    thread.start()
    rates = {"loop": [], "engine": []}
    try:
        run_loop(loop, texts[:4])
        run_engine(thread, texts)
        for _ in range(options.rounds):
            for name, run in (("loop", lambda: run_loop(loop, texts)), ("engine", lambda: run_engine(thread, texts))):
                started = time.perf_counter()
                made = run()
                rates[name].append(len(texts) / (time.perf_counter() - started))
                rates[f"{name} vectors"] = made
    finally:
        thread.stop()
    ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["engine"], rates["loop"], strict=True))
    cosines = (rates["loop vectors"] * rates["engine vectors"]).sum(axis=1)
    middle = {name: statistics.median(rates[name]) for name in ("loop", "engine")}
    print(f"{tokens:>8} {middle['loop']:>14.0f} {middle['engine']:>16.0f} {ratio:>11.2f}x {cosines.min():>13.5f}")
    return middle["loop"], middle["engine"]


def run_loop(session, texts):
    rows = []
    for text in texts:
        ids = np.array([text], np.int64)
        rows.append(session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0])
    return np.stack(rows)


def run_engine(thread, texts):
    rows, left, done = [None] * len(texts), [len(texts)], threading.Event()

    def take(place):
        def on_done(made, error):
            assert error is None, error
            rows[place] = made[0]
            left[0] -= 1
            if not left[0]:
                done.set()

        return on_done

    for place, text in enumerate(texts):
        thread.submit(EncodeTask(job_id=str(place), texts=[text], on_done=take(place), deadline_s=time.time() + 600))
    done.wait()
    return np.stack(rows)


if __name__ == "__main__":
    main()
