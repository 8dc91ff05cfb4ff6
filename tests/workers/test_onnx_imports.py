"""Exports of others are read back into the weights that they were made from, or refused with a reason."""

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from aiscale.wire.manifest import list_manifests
from tests.workers import exports
from tests.workers.test_imports import PROMPT, change, compute, spoil
from workers.artifacts import build
from workers.artifacts.errors import ArtifactError
from workers.artifacts.imports import import_model
from workers.engine.encoder import OnnxEncoder
from workers.engine.providers import CPU


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_optimum_export_is_the_model_that_it_was_made_from(
    tmp_path: Path, tiny_llama: Any, architecture: str, tied: bool
) -> None:
    model = dataclasses.replace(tiny_llama, architecture=architecture, tied=tied)
    made = import_model(tmp_path / "models", exports.write_optimum(model, tmp_path / "export"), "tiny", "fp32")
    plain = import_model(tmp_path / "plain", model.write_folder(tmp_path / "hf"), "tiny", "fp32")
    np.testing.assert_array_equal(compute(made), compute(plain))
    np.testing.assert_allclose(compute(made), model.logits(PROMPT, lambda _, value: value), atol=2e-4)
    assert build.verify(made.directory) == made.manifest and made.manifest.chat_template


@pytest.mark.parametrize(
    ("architecture", "packed", "dtype"),
    [
        ("llama", False, np.float32),
        ("llama", True, np.float16),
        ("qwen2", True, np.float32),
        ("qwen3", False, np.float32),
    ],
)
def test_an_export_of_genais_builder_is_the_model_that_it_was_made_from(
    tmp_path: Path, tiny_llama: Any, architecture: str, packed: bool, dtype: Any
) -> None:
    model = dataclasses.replace(tiny_llama, architecture=architecture, tied=packed)
    folder = exports.write_genai(model, tmp_path / "export", dtype, packed)
    made = import_model(tmp_path / "models", folder, "tiny", "fp32")
    expected = model.logits(PROMPT, lambda _, value: value)
    np.testing.assert_allclose(compute(made), expected, atol=2e-4 if dtype == np.float32 else 0.05)


def test_four_bit_blocks_are_what_their_kernel_multiplies_by(tmp_path: Path, tiny_llama: Any) -> None:
    folder = exports.write_genai(tiny_llama, tmp_path / "export", bits=4)
    made = import_model(tmp_path / "models", folder, "tiny", "fp32")

    def stored(name: str, value: Any) -> Any:
        return value if name == "token_embd.weight" else exports.quantize_int4(value).dequantize()

    np.testing.assert_allclose(compute(made), tiny_llama.logits(PROMPT, stored), atol=2e-4)


def test_an_exported_sentence_encoder_is_the_one_that_it_was_made_from(tmp_path: Path, tiny_llama: Any) -> None:
    weights = exports.write_bert(tmp_path / "export", tiny_llama.write_folder(tmp_path / "hf"))
    made = import_model(tmp_path / "models", tmp_path / "export", "small", "fp32")
    shutil.copytree(tmp_path / "export", tmp_path / "plain")
    (tmp_path / "plain" / "model.onnx").unlink()
    save_file(weights, tmp_path / "plain" / "model.safetensors")
    plain = import_model(tmp_path / "other", tmp_path / "plain", "small", "fp32")
    texts = [[5, 9, 14, 3], [40, 2]]
    found, expected = (OnnxEncoder(one.directory, [CPU], 1).encode(texts) for one in (made, plain))
    np.testing.assert_array_equal(found, expected)
    (tmp_path / "export" / "1_Pooling").mkdir()
    (tmp_path / "export" / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    first = import_model(tmp_path / "first", tmp_path / "export", "small", "fp32")
    assert not np.allclose(OnnxEncoder(first.directory, [CPU], 1).encode(texts), expected)


# --- what is refused -------------------------------------------------------------------------------------------------------------


def edit(folder: Path, alter: Callable[[Any], None]) -> None:
    model = onnx.load_model(str(folder / "model.onnx"), load_external_data=False)
    alter(model.graph)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def relocate(to: str) -> Callable[[Path], None]:
    def alter(graph: Any) -> None:
        for tensor in graph.initializer:
            for entry in tensor.external_data:
                entry.value = to if entry.key == "location" else entry.value

    return lambda folder: edit(folder, alter)


def inflate(folder: Path) -> None:
    """Claim a matrix of 2^62 values."""

    def alter(graph: Any) -> None:
        matrix = next(tensor for tensor in graph.initializer if len(tensor.dims) == 2)
        matrix.dims[:] = [1 << 31, 1 << 31]

    edit(folder, alter)


def shift(folder: Path) -> None:
    """Read from behind the end of the file."""

    def alter(graph: Any) -> None:
        for tensor in graph.initializer:
            for entry in tensor.external_data:
                entry.value = str(1 << 50) if entry.key == "offset" else entry.value

    edit(folder, alter)


def shift_back(folder: Path) -> None:
    def alter(graph: Any) -> None:
        for tensor in graph.initializer:
            for entry in tensor.external_data:
                entry.value = "-64" if entry.key == "offset" else entry.value

    edit(folder, alter)


def lose_a_node(folder: Path) -> None:
    def alter(graph: Any) -> None:
        [lost] = [node for node in graph.node if node.name == "/model/layers.1/mlp/down_proj/MatMul"]
        graph.node.remove(lost)

    edit(folder, alter)


def add_a_matrix(folder: Path) -> None:
    """Bring weights along that no part of the family has, as another architecture does."""
    extra = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "model.layers.0.mlp.router.weight")
    edit(folder, lambda graph: graph.initializer.append(extra))


def store_whole_numbers(folder: Path) -> None:
    """Hold a matrix as quantized exports do."""

    def alter(graph: Any) -> None:
        [matrix] = [node.input[1] for node in graph.node if node.name == "/model/layers.1/mlp/up_proj/MatMul"]
        tensor = next(tensor for tensor in graph.initializer if tensor.name == matrix)
        tensor.data_type = onnx.TensorProto.INT8

    edit(folder, alter)


def cut_data(folder: Path) -> None:
    path = folder / "model.onnx_data"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_graph(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


BROKEN: list[tuple[str, Callable[[Path], Any], str]] = [
    ("up", relocate("../model.onnx_data"), "outside its own folder"),
    ("absolute", relocate("/etc/passwd"), "outside its own folder"),
    ("nowhere", relocate("elsewhere.bin"), "which is not there"),
    ("nothing", relocate(""), "outside its own folder"),
    ("huge", inflate, "has the shape"),
    ("behind", shift, "not as large as its shape"),
    ("before", shift_back, "not as large as its shape"),
    ("node", lose_a_node, "ffn_down.weight|does not compute"),
    ("extra", add_a_matrix, "does not compute"),
    ("int8", store_whole_numbers, "blk.1.ffn_up.weight"),
    ("short", cut_data, "not as large as its shape"),
    ("cut", cut_graph, "not a whole ONNX graph"),
    ("layers", lambda folder: change(folder, "config.json", num_hidden_layers=2), "does not compute"),
    ("width", lambda folder: change(folder, "config.json", intermediate_size=64), "has the shape"),
    ("config", lambda folder: (folder / "config.json").unlink(), "without config.json"),
    ("kind", lambda folder: change(folder, "config.json", model_type="phi"), "'phi' model"),
]


@pytest.mark.parametrize(("breaking", "reason"), [item[1:] for item in BROKEN], ids=[item[0] for item in BROKEN])
def test_broken_and_hostile_exports_are_refused(
    tmp_path: Path, tiny_llama: Any, breaking: Callable[[Path], Any], reason: str
) -> None:
    folder, models = exports.write_optimum(tiny_llama, tmp_path / "export"), tmp_path / "models"
    breaking(folder)
    with pytest.raises(ArtifactError, match=reason) as caught:
        import_model(models, folder, "tiny", "fp32")
    assert "\n" not in str(caught.value)
    assert list_manifests(models) == [] and not list(models.glob(".work-*"))


def test_spoilt_exports_end_in_one_line_or_in_a_model(tmp_path: Path, tiny_llama: Any) -> None:
    folder, models, draw = exports.write_optimum(tiny_llama, tmp_path / "export"), tmp_path / "models", random.Random(6)
    whole = (folder / "model.onnx").read_bytes()
    for _ in range(20):
        (folder / "model.onnx").write_bytes(spoil(whole, draw))
        before = len(list_manifests(models))
        try:
            made = import_model(models, folder, "tiny", "fp32")
        except ArtifactError as error:
            assert "\n" not in str(error) and len(list_manifests(models)) == before
        else:
            assert build.verify(made.directory) == made.manifest
        assert not list(models.glob(".work-*"))
