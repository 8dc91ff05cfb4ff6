"""Show that sequences in one batch do not see each other, whatever rows they lie in."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tokenizers import Tokenizer

from aiscale.wire.manifest import read_manifest
from workers.artifacts import gguf_decoder
from workers.engine.kv_buffers import DeviceBuffers, HostBuffers, KvBuffers, KvShape
from workers.engine.providers import CPU, CUDA, UnknownProvider, choose_providers, providers_for
from workers.engine.rows import Rows
from workers.engine.runner import Chunk
from workers.engine.runner_onnx import OnnxRunner
from workers.engine.sessions import IDENTITY_GRAPH, open_session

LENGTHS = (3, 41, 17, 70)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    shape = gguf_decoder.convert(tiny_llama.write_gguf(folder / "tiny.gguf"), folder / "model.onnx", "fp32")
    facts = {"context_tokens": shape.context_tokens, "vocab_size": shape.vocab_size, "precision": "fp32"}
    (folder / "manifest.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def runner(tiny_dir: Path) -> Iterator[OnnxRunner]:
    made = OnnxRunner(tiny_dir, slots=4, context_tokens=128, providers=[CPU], threads=1)
    yield made
    made.close()


def open_real(directory: Path, slots: int) -> OnnxRunner:
    return OnnxRunner(directory, slots=slots, context_tokens=512, providers=[CPU], threads=0)


def greedy(runner: OnnxRunner, slot: int, prompt: NDArray[np.int64], count: int) -> list[int]:
    made = [int(runner.prefill(slot, prompt, 0).argmax())]
    while len(made) < count:
        position = np.array([len(prompt) + len(made) - 1])
        made.append(int(runner.decode([slot], np.array(made[-1:]), position)[0].argmax()))
    runner.release(slot)
    return made


def greedy_together(
    runner: OnnxRunner, prompts: list[NDArray[np.int64]], slots: list[int], count: int
) -> list[list[int]]:
    made = [[int(runner.prefill(s, p, 0).argmax())] for s, p in zip(slots, prompts, strict=True)]
    for step in range(count - 1):
        positions = np.array([len(prompt) + step for prompt in prompts])
        logits = runner.decode(slots, np.array([tokens[-1] for tokens in made]), positions)
        for tokens, row in zip(made, logits, strict=True):
            tokens.append(int(row.argmax()))
    return made


def chat(directory: Path, question: str) -> tuple[Tokenizer, NDArray[np.int64], tuple[int, ...]]:
    manifest = read_manifest(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    template = jinja2.Environment(autoescape=False).from_string(manifest.chat_template or "")
    text = template.render(messages=[{"role": "user", "content": question}], add_generation_prompt=True)
    return tokenizer, np.array(tokenizer.encode(text, add_special_tokens=False).ids), manifest.eos_token_ids


@pytest.mark.parametrize("precision", ["smollm2_dir", "smollm2_fp32_dir"])
def test_smollm2_knows_paris(request: pytest.FixtureRequest, precision: str) -> None:
    directory = request.getfixturevalue(precision)
    tokenizer, prompt, ends = chat(directory, "What is the capital of France?")
    runner = open_real(directory, 1)
    tokens = greedy(runner, 0, prompt, 12)
    runner.close()
    answer = tokens[: next((at for at, token in enumerate(tokens) if token in ends), len(tokens))]
    assert "Paris" in tokenizer.decode(answer)


SUBJECTS = ("the sea", "Paris", "a fox", "prime numbers", "rain", "a king", "Python", "bread", "the moon", "trains")
ASKED = ("Tell me about {}.", "Write a poem about {}", "What is {}?", "List five facts on {}, briefly.", "{}")


@pytest.mark.parametrize(("precision", "subjects"), [("smollm2_dir", 10), ("smollm2_fp32_dir", 1)])
def test_an_answer_does_not_depend_on_its_company(
    request: pytest.FixtureRequest, precision: str, subjects: int
) -> None:
    """To the bit: alone and in full batches, with prompts computed whole, in pieces, padded, or from a kept beginning."""
    directory = request.getfixturevalue(precision)
    prompts = [chat(directory, asked.format(subject))[1] for subject in SUBJECTS[:subjects] for asked in ASKED]
    runner = OnnxRunner(directory, slots=25, context_tokens=256, providers=[CPU], threads=0, kept_places=1)
    alone = []
    for prompt in prompts:
        first = runner.prefill(0, prompt, 0).copy()
        second = runner.decode([0], np.array([first.argmax()]), np.array([len(prompt)]))[0].copy()
        alone.append((first, second))
        runner.release(0)
    runner.prefill(0, prompts[0], 0)
    runner.keep(0, 0, 0, 20)
    runner.release(0)
    for at in range(0, len(prompts), 25):
        group = prompts[at : at + 25]
        for slot, prompt in enumerate(group):
            if slot % 3 == 0:
                runner.restore(0, slot, 20)
            elif slot % 3 == 1:
                runner.prefill(slot, prompt[:7], 0)
        starts = [(20, 7, 0)[slot % 3] for slot in range(len(group))]
        chunks = [Chunk(s, p[n:].tolist(), n) for s, (p, n) in enumerate(zip(group, starts, strict=True))]
        together = runner.compute(chunks).copy()
        positions = np.array([len(prompt) for prompt in group])
        following = runner.decode(list(range(len(group))), together.argmax(axis=1), positions).copy()
        for slot in range(len(group)):
            assert np.array_equal(together[slot], alone[at + slot][0])
            assert np.array_equal(following[slot], alone[at + slot][1])
            runner.release(slot)
    runner.close()


def prompts_of(seed: int) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 40, length) for length in LENGTHS]


@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_rows_of_a_batch_are_strangers(runner: OnnxRunner, slots: list[int]) -> None:
    alone = [greedy(runner, 0, prompt, 20) for prompt in prompts_of(1)]
    assert greedy_together(runner, prompts_of(1), slots, 20) == alone


def test_released_slot_leaves_no_trace(runner: OnnxRunner, tiny_dir: Path) -> None:
    """Another's answer must not depend on who had the slot before: to the bit."""
    long, short = prompts_of(2)[3], prompts_of(2)[0]
    fresh = OnnxRunner(tiny_dir, slots=4, context_tokens=128, providers=[CPU], threads=1)
    expected = [fresh.prefill(1, short, 0).copy()]
    expected.append(fresh.decode([1], np.array([7]), np.array([3]))[0].copy())
    runner.prefill(1, long, 0)
    runner.release(1)
    assert np.array_equal(runner.prefill(1, short, 0), expected[0])
    assert np.array_equal(runner.decode([1], np.array([7]), np.array([3]))[0], expected[1])


def test_a_fork_goes_on_as_its_source_would(runner: OnnxRunner) -> None:
    prompt = prompts_of(4)[1]
    first = int(runner.prefill(2, prompt, 0).argmax())
    runner.fork(2, 0)
    with pytest.raises(ValueError, match="cannot be given"):
        runner.fork(2, 0)
    at = np.array([len(prompt)])
    ahead = runner.decode([2], np.array([first]), at).copy()
    runner.release(2)
    assert np.array_equal(runner.decode([0], np.array([first]), at), ahead)


def test_any_order_of_arrivals_and_departures(tiny_dir: Path) -> None:
    """Play 300 random steps of a busy engine; each sequence's logits equal those of a runner of its own."""
    dice = random.Random(3)
    busy = OnnxRunner(tiny_dir, slots=5, context_tokens=64, providers=[CPU], threads=1)
    lone = OnnxRunner(tiny_dir, slots=1, context_tokens=64, providers=[CPU], threads=1)
    held: dict[int, list[int]] = {}
    for _ in range(300):
        free = [slot for slot in range(5) if slot not in held]
        act = dice.choice(["arrive", "decode", "decode", "decode", "leave", "extend"])
        if act == "arrive" and free:
            slot = dice.choice(free)
            held[slot] = [dice.randrange(3, 40) for _ in range(dice.randrange(1, 9))]
            busy.prefill(slot, np.array(held[slot]), 0)
        elif act == "extend" and held:
            slot = dice.choice(list(held))
            more = [dice.randrange(3, 40) for _ in range(3)]
            if len(held[slot]) + 3 <= 64:
                busy.prefill(slot, np.array(more), len(held[slot]))
                held[slot] += more
        elif act == "leave" and len(held) > 1:
            slot = dice.choice(list(held))
            busy.release(slot)
            del held[slot]
        elif act == "decode" and held:
            fit = [slot for slot in held if len(held[slot]) < 64]
            chosen = dice.sample(fit, dice.randrange(1, len(fit) + 1)) if fit else []
            if not chosen:
                continue
            tokens = np.array([dice.randrange(3, 40) for _ in chosen])
            positions = np.array([len(held[slot]) for slot in chosen])
            logits = busy.decode(chosen, tokens, positions).copy()
            for slot, token in zip(chosen, tokens, strict=True):
                held[slot].append(int(token))
            at = dice.randrange(len(chosen))
            expected = lone.prefill(0, np.array(held[chosen[at]]), 0)
            np.testing.assert_allclose(logits[at], expected, atol=1e-4)
            lone.release(0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda r: r.prefill(4, np.array([5]), 0), "no slot 4"),
        (lambda r: r.prefill(0, np.array([5]), 2), "holds 0 tokens"),
        (lambda r: r.prefill(0, np.array([], np.int64), 0), "cannot take 0 tokens"),
        (lambda r: r.prefill(0, np.full(129, 5), 0), "cannot take 129 tokens"),
        (lambda r: r.decode([], np.array([]), np.array([])), "at least one slot"),
        (lambda r: r.decode([0, 0], np.array([5, 5]), np.array([1, 1])), "only once"),
    ],
)
def test_impossible_calls_are_refused(runner: OnnxRunner, call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call(runner)


def test_limits_are_those_of_the_model(tiny_dir: Path, tiny_llama: Any) -> None:
    runner = OnnxRunner(tiny_dir, slots=2, context_tokens=100_000, providers=[CPU], threads=1)
    assert runner.context_tokens == tiny_llama.context_tokens
    assert runner.vocab_size == len(tiny_llama.words)
    prompt = np.random.default_rng(0).integers(3, 40, tiny_llama.context_tokens - 1)
    runner.prefill(0, prompt, 0)
    runner.decode([0], np.array([5]), np.array([len(prompt)]))
    with pytest.raises(ValueError, match="cannot take 1 tokens"):
        runner.decode([0], np.array([5]), np.array([len(prompt) + 1]))


def test_memory_is_taken_as_sequences_grow_and_given_back() -> None:
    """Sixteen slots of 4,096 tokens would be 3 GB; they cost what is written."""
    shape = KvShape(tensors=60, rows=17, kv_heads=3, capacity=4096, head_dim=64, dtype=np.dtype(np.float32))
    before_bytes = resident_bytes()
    buffers = HostBuffers(shape)
    assert resident_bytes() - before_bytes < 64 << 20
    for array in buffers._arrays:
        array[3] = 1.0
    held_bytes = resident_bytes() - before_bytes
    assert held_bytes > 150 << 20
    buffers.clear(3)
    assert resident_bytes() - before_bytes < 64 << 20
    assert not buffers._arrays[0][3].any()
    buffers.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_move_whole(kind: str, dtype: Any) -> None:
    """The accelerator's way of copying runs here on the CPU: the same calls, another device name."""
    shape = KvShape(tensors=2, rows=3, kv_heads=2, capacity=64, head_dim=8, dtype=np.dtype(dtype))
    buffers: KvBuffers
    if kind == "host":
        buffers = HostBuffers(shape)
        arrays = buffers._arrays
    else:
        buffers = DeviceBuffers(shape, "cpu", open_session(IDENTITY_GRAPH, [CPU], 1))
        arrays = [value.numpy() for value in buffers._values]
    for array in arrays:
        array[:] = np.random.default_rng(0).standard_normal(array.shape)
    want = [array[2, :, :10].copy() for array in arrays]
    kept = [array[0, :, 10:].copy() for array in arrays]
    buffers.move(2, 0, 10)
    for array, moved, rest in zip(arrays, want, kept, strict=True):
        assert np.array_equal(array[0, :, :10], moved)
        assert np.array_equal(array[0, :, 10:], rest)


def test_identity_graph_is_what_it_says() -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.UINT8, ["n"]) for name in ("source", "target")]
    graph = helper.make_graph([helper.make_node("Identity", ["source"], ["target"])], "copy", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert onnx.load_from_string(IDENTITY_GRAPH) == model


def test_rows_gather_with_the_least_copying() -> None:
    rows = Rows(6)
    for slot, tokens in enumerate((100, 5, 100, 100)):
        rows.take(slot)
        rows.set_length(slot, tokens)
    rows.drop(2)
    assert rows.gather([3, 0, 1]) == (0, [(3, 2, 100)])
    assert rows.gather([0, 1]) == (0, [])
    assert rows.gather([1, 3]) == (1, [])
    assert rows.gather([0, 3]) == (2, [(0, 3, 100)]), "an empty row costs less than one that must make way"
    assert {slot: rows.row(slot) for slot in (0, 1, 3)} == {0: 3, 1: 1, 3: 2}
    assert rows.take(9) == 0


def test_full_rows_change_places_by_the_spare_one() -> None:
    rows = Rows(3)
    for slot, tokens in enumerate((100, 5, 80)):
        rows.take(slot)
        rows.set_length(slot, tokens)
    assert rows.gather([0, 2]) == (0, [(1, 3, 5), (2, 1, 80), (3, 2, 5)])
    assert [rows.row(slot) for slot in range(3)] == [0, 2, 1]


@pytest.mark.parametrize(
    ("requested", "available", "chosen"),
    [
        (None, [CPU], [CPU]),
        ("", ["TensorrtExecutionProvider", CUDA, CPU], [CUDA, CPU]),
        ("CPUExecutionProvider", [CUDA, CPU], [CPU]),
        ("CUDAExecutionProvider, CPUExecutionProvider", [CUDA, CPU], [CUDA, CPU]),
        (CUDA, [CUDA, CPU], [CUDA, CPU]),
        (f"{CPU},{CPU}", [CPU], [CPU]),
    ],
)
def test_providers_are_chosen(requested: str | None, available: list[str], chosen: list[str]) -> None:
    assert choose_providers(requested, available) == chosen


@pytest.mark.parametrize("requested", [CUDA, "cpu", ",", f"{CPU},Nonsense"])
def test_providers_that_are_not_there_are_named(requested: str) -> None:
    with pytest.raises(UnknownProvider, match="it has CPUExecutionProvider"):
        choose_providers(requested, ort.get_available_providers()[-1:])


def test_gpus_are_for_fp16() -> None:
    assert providers_for("fp16", [CUDA, CPU]) == [CUDA, CPU]
    assert providers_for("int8", [CUDA, CPU]) == [CPU]


def test_missing_graph_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"context_tokens": 9, "vocab_size": 9, "precision": "fp32"}')
    with pytest.raises(FileNotFoundError, match=r"python -m workers\.artifacts ensure"):
        OnnxRunner(tmp_path, slots=1, context_tokens=9, providers=[CPU], threads=1)
