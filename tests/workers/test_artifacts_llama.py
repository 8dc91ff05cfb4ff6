"""Show that the GGUF converter computes the model that the file describes, against a forward pass in plain numpy."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from workers.artifacts import gguf_decoder, gguf_tokenizer
from workers.artifacts.errors import ConversionError
from workers.artifacts.integer import needs_unsigned
from workers.artifacts.quantize import BLOCK, quantize_int4, quantize_int8, quantize_rows
from workers.engine.detokenizer import Detokenizer
from workers.engine.providers import CPU
from workers.engine.runner_onnx import OnnxRunner

PROMPT = [5, 9, 14, 3, 30, 31, 8, 22, 17, 6, 40, 12]
Q8_0 = gguf.GGMLQuantizationType.Q8_0
Q4_1 = gguf.GGMLQuantizationType.Q4_1


def convert(llama: Any, folder: Path, precision: str, quantization: Any = None) -> OnnxRunner:
    source = llama.write_gguf(folder / "tiny.gguf", quantization)
    shape = gguf_decoder.convert(source, folder / "model.onnx", precision)  # type: ignore[arg-type]
    facts = {"context_tokens": shape.context_tokens, "vocab_size": shape.vocab_size, "precision": precision}
    facts["unsigned_weights"] = needs_unsigned()
    (folder / "manifest.json").write_text(json.dumps(facts))
    return OnnxRunner(folder, slots=4, context_tokens=128, providers=[CPU], threads=1)


def stored(quantization: Any) -> Any:
    def rounded(name: str, value: NDArray[np.float32]) -> NDArray[np.float32]:
        if quantization is None:
            return value
        return gguf.quants.dequantize(gguf.quants.quantize(value, quantization), quantization)

    return rounded


def steps(runner: OnnxRunner) -> NDArray[np.float32]:
    """Return the logits after PROMPT, computed in a chunk, another with a past, and one decode step."""
    ids = np.array(PROMPT)
    runner.prefill(2, ids[:5], 0)
    runner.prefill(2, ids[5:-1], 5)
    return runner.decode([2], ids[-1:], np.array([len(PROMPT) - 1]))[0].copy()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", [None, Q8_0, Q4_1], ids=str)
def test_fp32_graph_equals_numpy(
    tmp_path: Path, tiny_llama: Any, tied: bool, quantization: Any, architecture: str
) -> None:
    head_dim = 32 if architecture == "qwen3" else 16
    llama = dataclasses.replace(tiny_llama, tied=tied, architecture=architecture, head_dim=head_dim, rope_base=5e4)
    expected = llama.logits(PROMPT, stored(quantization))
    runner = convert(llama, tmp_path, "fp32", quantization)
    np.testing.assert_allclose(runner.prefill(0, np.array(PROMPT), 0), expected, atol=2e-4)
    np.testing.assert_allclose(steps(runner), expected, atol=2e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_file_goes_on_as_numpy_would(tmp_path: Path, tiny_llama: Any, architecture: str) -> None:
    """Token after token, each the likeliest, by the engine's own steps and by a forward pass of all that went before."""
    llama = dataclasses.replace(tiny_llama, architecture=architecture, head_dim=32 if architecture == "qwen3" else 16)
    expected = list(PROMPT)
    for _ in range(24):
        expected.append(int(llama.logits(expected, stored(None)).argmax()))
    runner = convert(llama, tmp_path, "fp32", None)
    found = [*PROMPT, int(runner.prefill(1, np.array(PROMPT), 0).argmax())]
    while len(found) < len(expected):
        found.append(int(runner.decode([1], np.array(found[-1:]), np.array([len(found) - 1]))[0].argmax()))
    assert found == expected


def converted(precision: str) -> Any:
    """Return what each precision is meant to make of a matrix, so that only the rounding of activations is left."""

    def rounded(name: str, value: NDArray[np.float32]) -> NDArray[np.float32]:
        ends = name in ("token_embd.weight", "output.weight")
        if precision == "fp16":
            return value.astype(np.float16).astype(np.float32)
        if precision == "int8" and name != "token_embd.weight":
            codes, scales = quantize_rows(value)
            return codes * scales[:, None]
        return (quantize_int8 if precision == "int8" or ends else quantize_int4)(value).dequantize()

    return rounded


@pytest.mark.parametrize(("precision", "least"), [("fp16", 0.9999), ("int8", 0.9995), ("int4", 0.99)])
def test_narrow_graphs_compute_their_rounded_weights(
    tmp_path: Path, tiny_llama: Any, precision: str, least: float
) -> None:
    llama = dataclasses.replace(tiny_llama, tied=False)
    expected = llama.logits(PROMPT, converted(precision))
    found = steps(convert(llama, tmp_path, precision)).astype(np.float64)
    assert np.dot(found, expected) / np.linalg.norm(found) / np.linalg.norm(expected) > least


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_quantized_matrices_come_back(blocks: int) -> None:
    weight = np.random.default_rng(1).standard_normal((37, blocks * BLOCK)).astype(np.float32)
    int8, int4 = quantize_int8(weight).dequantize(), quantize_int4(weight).dequantize()
    spread = np.abs(weight).max()
    assert np.abs(int8 - weight).max() <= spread / 127
    assert np.sqrt(np.square(int4 - weight).mean()) < 0.1 * weight.std()


def test_int4_keeps_what_a_whole_zero_point_can_say() -> None:
    codes = np.random.default_rng(2).integers(0, 16, (64, BLOCK))
    codes[:, 0], codes[:, 1] = 0, 15
    weight = ((codes - 6) * 0.031).astype(np.float32)
    np.testing.assert_allclose(quantize_int4(weight).dequantize(), weight, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.25, -0.25])
def test_constant_blocks_do_not_divide_by_zero(value: float) -> None:
    weight = np.full((3, 2 * BLOCK), value, np.float32)
    np.testing.assert_allclose(quantize_int4(weight).dequantize(), weight, atol=1e-6)
    np.testing.assert_allclose(quantize_int8(weight).dequantize(), weight, atol=1e-6)


def test_rows_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ConversionError, match="blocks of 32"):
        quantize_int8(np.zeros((2, 40), np.float32))


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConversionError, match="of decoders, llama, qwen2, qwen3"):
        gguf_decoder.convert(tmp_path / "m.gguf", tmp_path / "model.onnx", "fp32")


def test_tokenizer_and_vocabulary(tmp_path: Path, tiny_llama: Any) -> None:
    source = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    vocabulary = gguf_tokenizer.convert_tokenizer(source, tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert vocabulary.eos_token_ids == (2, 0)
    assert (vocabulary.bos_token, vocabulary.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert vocabulary.chat_template is not None
    text = "<|im_start|>hello tea 42<|im_end|>\n"
    encoded = tokenizer.encode(text)
    assert encoded.tokens[:4] == ["<|im_start|>", "hel", "l", "o"]
    assert encoded.tokens[-5:] == ["Ġ", "4", "2", "<|im_end|>", "Ċ"], "digits stand alone"
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text


def write_pieces(path: Path, pieces: list[tuple[str, float]], prefix_space: bool = True) -> Path:
    """Write a GGUF file with a SentencePiece vocabulary: the usual head, 256 bytes, and ``pieces`` with their scores."""
    writer = gguf.GGUFWriter(str(path), "llama")
    head = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256))]
    whole = [*head, *((piece, score, 1) for piece, score in pieces), ("<|user|>", 0.0, 4)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _, _ in whole])
    writer.add_token_scores([score for _, score, _ in whole])
    writer.add_token_types([kind for _, _, kind in whole])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(prefix_space)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


PIECES = [
    ("\u2581h", -1.0),
    ("el", -2.0),
    ("\u2581he", -3.0),
    ("lo", -4.0),
    ("\u2581hel", -5.0),
    ("\u2581hello", -6.0),
    ("ll", -0.5),
]
LETTERS = [(letter, -100.0) for letter in "\u2581hello wrd".replace(" ", "")]


def test_sentencepiece_vocabularies_are_rebuilt(tmp_path: Path) -> None:
    pieces = [*PIECES, *dict(LETTERS).items()]
    vocabulary = gguf_tokenizer.convert_tokenizer(
        write_pieces(tmp_path / "m.gguf", pieces), tmp_path / "tokenizer.json"
    )
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert (vocabulary.bos_token, vocabulary.eos_token, vocabulary.eos_token_ids) == ("<s>", "</s>", (2,))
    # by score: ll first, which keeps el and lo from coming about
    assert tokenizer.encode("hello").tokens == ["\u2581he", "ll", "o"]
    assert tokenizer.encode("hel").tokens == ["\u2581hel"]
    text = "hello w\u00e9rld  \u4e16"
    encoded = tokenizer.encode(text)
    assert "<0xC3>" in encoded.tokens and tokenizer.decode(encoded.ids) == text
    assert tokenizer.encode("<s>hel</s><|user|>").tokens == ["<s>", "\u2581hel", "</s>", "<|user|>"]
    stream = Detokenizer(tokenizer)
    assert "".join(stream.add(token) for token in encoded.ids) + stream.flush() == text
    bare = write_pieces(tmp_path / "bare.gguf", pieces, prefix_space=False)
    gguf_tokenizer.convert_tokenizer(bare, tmp_path / "bare.json")
    assert Tokenizer.from_file(str(tmp_path / "bare.json")).encode("ll o").tokens == ["ll", "\u2581", "o"]
