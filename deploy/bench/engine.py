"""Measure generation beside llama.cpp: the same GGUF file, the same prompts, the same number of threads, in alternating rounds.

    make bench-engine

"engine" is the engine as workers run it: sampler, detokenizer, one thread that steps, memory in large pages (`LARGE_PAGES` in
`aiscale.embedded.stack`; the Makefile sets it, and llama.cpp has it too). llama.cpp is the server of the package
`xllamacpp` (llama-cpp-python has no wheel), called in this process. Its wheel is built for AVX2; the first line says what it found.
"""

import argparse
import itertools
import math
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import psutil
import xllamacpp
from machine import measure_peaks
from tokenizers import Tokenizer

from aiscale import env
from workers.artifacts import build
from workers.artifacts.fetch import fetch
from workers.engine.detokenizer import Detokenizer
from workers.engine.engine import Engine
from workers.engine.runner_onnx import OnnxRunner
from workers.engine.scheduler import STALL_S
from workers.engine.sequence import Params, Sequence

MODEL = "smollm2-135m-instruct"
WIDTHS = (1, 4, 8, 16, 32)
PROMPT_TOKENS, LONG_TOKENS, STALL_TOKENS = 50, 400, 1000
SLOT_TOKENS = 512
NEVER_S = 1e12
MOST_DISTURBED = 0.25
"""Of the machine's time that others may take while something is measured: beyond it the figure says little, and is taken again."""
MOST_TRIES = 5
BYTES_A_VALUE = 2
"""Of int8 graphs: inputs are written as two bytes (decision 0041)."""


class Ours:
    def __init__(self, directory, threads, *, slots=33, context_tokens=SLOT_TOKENS, speculates="never"):
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        runner = OnnxRunner(
            directory, slots=slots, context_tokens=context_tokens, providers=["CPUExecutionProvider"], threads=threads
        )
        self.name = f"guesses {speculates}"
        self.guessed = self.right = self.longest_chunk = 0
        self.engine = Engine(runner, (), self.on_step, speculates=speculates)
        self.engine.start()
        self.count = 0

    def on_step(self, report):
        self.guessed += report.guessed
        self.right += report.guessed_right
        if report.decoded:
            self.longest_chunk = max(self.longest_chunk, report.prefilled)

    def start(self, prompt, max_tokens, told_at=None):
        """Start a request; return (set at its first token, set at its end). ``told_at`` gets the times of its tokens."""
        first, done = threading.Event(), threading.Event()

        def on_output(output):
            if output.completion_tokens:
                first.set()
            if told_at is not None:
                told_at.append(time.perf_counter())
            if output.end is not None:
                done.set()

        self.count += 1
        sequence = Sequence(
            job_id=f"b{self.count}",
            prompt=prompt,
            params=Params(max_tokens=max_tokens, temperature=0.0),
            priority=0,
            deadline_s=NEVER_S,
            detokenizer=Detokenizer(self.tokenizer),
            on_output=on_output,
        )
        self.engine.submit(sequence)
        return first, done

    def stop_running(self):
        for n in range(self.count + 1):
            self.engine.abort(f"b{n}", "cancelled")


class Theirs:
    name = "llama.cpp"

    def __init__(self, gguf, threads):
        params = xllamacpp.CommonParams()
        params.model.path = str(gguf)
        params.n_parallel, params.n_ctx, params.kv_unified = 33, 33 * SLOT_TOKENS, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity, params.n_gpu_layers = -1, 0
        self.server = xllamacpp.Server(params)

    def start(self, prompt, max_tokens):
        first, done = threading.Event(), threading.Event()

        def run():
            asked = {"prompt": prompt, "n_predict": max_tokens, "temperature": 0, "ignore_eos": True}
            self.server.handle_completions(asked | {"cache_prompt": False})
            if max_tokens == 1:
                first.set()
            done.set()

        threading.Thread(target=run, daemon=True).start()
        return first, done

    def stop_running(self):
        """The server ends by itself."""


def make_prompts(count, tokens, seed):
    return np.random.default_rng(seed).integers(1000, 40_000, (count, tokens)).tolist()


def measure_width(side, width, tokens, seed):
    """Return tokens/s of ``width`` requests at once, their prompts' time included."""
    started = time.perf_counter()
    ends = [side.start(prompt, tokens)[1] for prompt in make_prompts(width, PROMPT_TOKENS, seed)]
    for end in ends:
        end.wait()
    return width * tokens / (time.perf_counter() - started)


def measure_prefill(side, seed):
    started = time.perf_counter()
    side.start(make_prompts(1, LONG_TOKENS, seed)[0], 1)[1].wait()
    return LONG_TOKENS / (time.perf_counter() - started)


def measure_first_token(side, running, seed):
    """Return the milliseconds to the first token of a request that comes while ``running`` others are answered."""
    ends = [side.start(prompt, 60)[1] for prompt in make_prompts(running, 8, seed)]
    time.sleep(0.5)
    started = time.perf_counter()
    first, _ = side.start(make_prompts(1, PROMPT_TOKENS, seed + 1)[0], 1)
    first.wait()
    waited_ms = (time.perf_counter() - started) * 1e3
    side.stop_running()
    for end in ends:
        end.wait()
    return waited_ms


def show_stall(directory, threads):
    """Print how long eight running streams wait for a token while a long prompt comes in, beside how long they wait without it."""
    side = Ours(directory, threads, slots=9, context_tokens=1280)
    gaps_ms = {}
    for label, count in (("warm", 1), ("without", 0), ("with", 1)):
        told = [[] for _ in range(8)]
        ends = [side.start(prompt, 200, at)[1] for prompt, at in zip(make_prompts(8, 8, 3), told, strict=True)]
        time.sleep(0.5)
        from_s, side.longest_chunk = time.perf_counter(), 0
        for prompt in make_prompts(count, STALL_TOKENS, 4):
            side.start(prompt, 1)[1].wait()
        until_s = time.perf_counter() if count else from_s + 1.5
        time.sleep(max(until_s - time.perf_counter(), 0))
        side.stop_running()
        for end in ends:
            end.wait()
        gaps_ms[label] = [
            (b - a) * 1e3 for at in told for a, b in itertools.pairwise(at) if from_s <= a and b <= until_s
        ]
    side.engine.stop()
    most, middle = ({label: how(found) for label, found in gaps_ms.items()} for how in (max, statistics.median))
    print(
        f"a prompt of {STALL_TOKENS} tokens among 8 streams: a token after {middle['with']:.0f} ms, {most['with']:.0f} at the latest; "
        f"without it {middle['without']:.0f} and {most['without']:.0f}. Prompts may take {STALL_S * 1e3:.0f} ms of a step: "
        f"at most {side.longest_chunk} tokens did",
        flush=True,
    )


COPY = "The harbour lay still in the early light, and the boats had not yet left for the open sea."
GUESSED_AT = (
    ("copy a text word for word", f"Repeat these sentences exactly, twice:\n\n{COPY} {COPY}", 96),
    ("tell a story", "Write a story about a lighthouse keeper who finds a letter.", 96),
    ("noise: it repeats itself", None, 96),
)


def show_guesses(directory, threads, rounds):
    """Print tokens/s of one greedy stream with guesses from the text and without, where that gains and where it does not."""
    sides = [Ours(directory, threads, slots=1, speculates=when) for when in ("always", "never")]
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    print(f"{'one stream, tokens/s':>32} {'guessing':>10} {'without':>10} {'ratio':>7}")
    for label, text, tokens in GUESSED_AT:
        prompt = sides[0].tokenizer.encode(template.format(text)).ids if text else make_prompts(1, PROMPT_TOKENS, 7)[0]
        guessing = sides[0]
        guessing.guessed = guessing.right = 0

        def measure(side, _, prompt=prompt, tokens=tokens):
            first, done = side.start(prompt, tokens)
            first.wait()
            started = time.perf_counter()
            done.wait()
            return (tokens - 1) / (time.perf_counter() - started)

        compare(label, sides, rounds, measure)
        print(f"{'':>32} {guessing.right} of {guessing.guessed} guesses were right, in all rounds")
    for side in sides:
        side.engine.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models-dir", type=Path, default=env.load().models_dir)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="made by each request")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS)
    parser.add_argument("--only-widths", action="store_true", help="leave prefill and first tokens out")
    options = parser.parse_args()
    threads = os.cpu_count() or 1
    [manifest] = build.ensure(options.models_dir, [MODEL])
    with tempfile.TemporaryDirectory() as folder:
        paths = fetch(build.find_model(MODEL), Path(folder))
        gguf = next(path for path in paths.values() if path.suffix == ".gguf")
        sides = [Ours(options.models_dir / MODEL / manifest.version, threads), Theirs(gguf, threads)]
        print("llama.cpp:", xllamacpp.get_system_info().strip())
        print(f"{MODEL} {manifest.precision}, {threads} threads, median of {options.rounds} alternating rounds")
        products, head = count_products(options.models_dir / MODEL / manifest.version / "model.onnx")
        peaks = measure_peaks()
        print(peaks.describe())
        for side in sides:
            measure_width(side, 2, 4, 0)
        print(f"{'':>32} {'engine':>10} {'llama.cpp':>10} {'ratio':>7}")
        for width in options.widths:
            label = f"{width} streams, tokens/s"
            rate, _ = compare(
                label, sides, options.rounds, lambda side, n, w=width: measure_width(side, w, options.tokens, n)
            )
            reach(products, rate, rate / width, peaks)
        if options.only_widths:
            return
        rate, _ = compare("prefill, tokens/s", sides, options.rounds, measure_prefill)
        reach(products - head, rate, 0.0, peaks)
        for running in (8, 16):
            label = f"first token, {running} running, ms"
            compare(label, sides, options.rounds, lambda side, n, r=running: measure_first_token(side, r, n))
        sides[0].engine.stop()
    show_stall(options.models_dir / MODEL / manifest.version, threads)
    show_guesses(options.models_dir / MODEL / manifest.version, threads, options.rounds)


def disturbed_by(measure, *arguments):
    """Return what is measured, and which share of the machine's time other processes took meanwhile."""
    busy_s, own_s, started = busy_seconds(), time.process_time(), time.perf_counter()
    found = measure(*arguments)
    others_s = busy_seconds() - busy_s - (time.process_time() - own_s)
    return found, max(others_s, 0.0) / ((time.perf_counter() - started) * (os.cpu_count() or 1))


def busy_seconds():
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait


def compare(label, sides, rounds, measure):
    """Measure the sides in turn and print the medians; a turn in which others took the machine is done again."""
    found = {side.name: [] for side in sides}
    worst = 0.0
    for number in range(rounds):
        for side in sides:
            best = None
            for _ in range(MOST_TRIES):
                tried = disturbed_by(measure, side, number)
                best = tried if best is None or tried[1] < best[1] else best
                if best[1] <= MOST_DISTURBED:
                    break
                time.sleep(1.0)
            found[side.name].append(best[0])
            worst = max(worst, best[1])
    ours, theirs = (statistics.median(found[side.name]) for side in sides)
    print(
        f"{label:>32} {ours:>10.1f} {theirs:>10.1f} {ours / theirs:>7.2f}"
        + (f"  disturbed: others took {worst:.0%} of the machine" if worst > MOST_DISTURBED else ""),
        flush=True,
    )
    return ours, theirs


def count_products(graph):
    """Return how many weights a token is multiplied by, and how many of them are the head's, which prompts need once."""
    model = onnx.load_model(str(graph), load_external_data=False).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in model.initializer}
    found = [
        math.prod(shapes[name])
        for node in model.node
        if node.op_type.startswith("MatMul")
        for name in node.input
        if len(shapes.get(name, ())) == 2
    ]
    return sum(found), max(found)


def reach(products, tokens_per_s, steps_per_s, peaks):
    """Print how near int8 comes to the machine's limits: what it multiplies, and what it reads of its weights, once a step."""
    gops = 2 * BYTES_A_VALUE * products * tokens_per_s / 1e9
    read_gb = products * steps_per_s / 1e9
    print(
        f"{'':>32} {gops:.0f} GOP/s of bytes, {gops / peaks.integer_gops:.0%} of the peak"
        + (f"; {read_gb:.1f} GB/s of weights, {read_gb / peaks.read_gb:.0%} of a copy's" if steps_per_s else ""),
        flush=True,
    )


if __name__ == "__main__":
    main()
