"""Models that somebody has are converted to what they are, or refused with a reason; what is refused leaves nothing behind."""

import dataclasses
import json
import pickle
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer

from aiscale.wire.manifest import MANIFEST_FILE, TOKENIZER_FILE, list_manifests, read_manifest
from workers.artifacts import build
from workers.artifacts.__main__ import main
from workers.artifacts.errors import ArtifactError
from workers.artifacts.imports import Imported, import_model
from workers.artifacts.quality import Quality
from workers.engine.providers import CPU
from workers.engine.runner_onnx import OnnxRunner

PROMPT = [5, 9, 14, 3, 30, 31, 8, 22, 17, 6, 40, 12]
ARCHITECTURES = ["llama", "qwen2", "qwen3"]


def compute(made: Imported) -> Any:
    runner = OnnxRunner(made.directory, slots=1, context_tokens=64, providers=[CPU], threads=1)
    try:
        return runner.prefill(0, np.array(PROMPT), 0).copy()
    finally:
        runner.close()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_folder_of_safetensors_is_the_model_that_it_describes(
    tmp_path: Path, tiny_llama: Any, architecture: str, dtype: str
) -> None:
    model = dataclasses.replace(tiny_llama, architecture=architecture, head_dim=32, rope_base=1e6, tied=dtype == "BF16")
    made = import_model(tmp_path / "models", model.write_folder(tmp_path / "hf", dtype), "tiny", "fp32")

    def stored(name: str, value: Any) -> Any:
        return value if dtype == "F32" else (value.view(np.uint32) >> 16 << 16).view(np.float32)

    # biases and gains are cut too, and only matrices pass through `stored`
    np.testing.assert_allclose(compute(made), model.logits(PROMPT, stored), atol=2e-4 if dtype == "F32" else 0.2)
    assert build.verify(made.directory) == made.manifest
    assert (made.manifest.bos_token, made.manifest.eos_token_ids[0]) == ("<|im_start|>", 2)
    assert made.manifest.chat_template and made.manifest.batch_invariant


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_narrow_imports_are_compared_with_fp32(
    tmp_path: Path, tiny_llama: Any, architecture: str, precision: Any
) -> None:
    model = dataclasses.replace(tiny_llama, architecture=architecture)
    source = model.write_gguf(tmp_path / "tiny.gguf")
    made = import_model(tmp_path / "models", source, "tiny", precision)
    wide = import_model(tmp_path / "models", source, "tiny", "fp32")
    assert made.manifest.version != wide.manifest.version and len(list_manifests(tmp_path / "models")) == 2
    found, expected = compute(made), compute(wide)
    assert found @ expected / np.linalg.norm(found) / np.linalg.norm(expected) > (0.9 if precision == "int4" else 0.999)
    [size, told, *_] = made.report
    assert size.startswith("size: ") and "the likeliest token is fp32's for" in told
    assert made.manifest.batch_invariant == (precision != "int4")
    assert not list((tmp_path / "models").glob(".work-*"))


def test_the_real_smollm2_is_imported(tmp_path: Path, smollm2_gguf: Path, smollm2_dir: Path) -> None:
    """98 MB of Q4_1 and Q8_0, a vocabulary of 49,152: to the bit what the bundled model computes, and as good as fp32, as it says."""
    made = import_model(tmp_path / "models", smollm2_gguf, "smollm2", "int8")
    bundled = read_manifest(smollm2_dir)
    for fact in ("files", "file_sizes_bytes", "name", "source", "license"):
        bundled = msgspec.structs.replace(bundled, **{fact: getattr(made.manifest, fact)})
    assert made.manifest == bundled and made.manifest.chat_template and made.manifest.batch_invariant
    assert (made.directory / TOKENIZER_FILE).read_bytes() == (smollm2_dir / TOKENIZER_FILE).read_bytes()
    size, quality = made.report
    found = re.fullmatch(r"size: ([\d.]+) MB, fp32 ([\d.]+) MB", size)
    assert found is not None and 3 * float(found[1]) < float(found[2])
    told = re.search(r"perplexity ([\d.]+) over (\d+) tokens .* fp32 ([\d.]+); .* fp32's for ([\d.]+)%", quality)
    assert told is not None, quality
    perplexity, tokens, fp32, agreement = map(float, told.groups())
    assert tokens > 500 and perplexity < 1.02 * fp32 and agreement > 90
    theirs = OnnxRunner(smollm2_dir, slots=1, context_tokens=64, providers=[CPU], threads=1)
    np.testing.assert_array_equal(compute(made), theirs.prefill(0, np.array(PROMPT), 0))
    theirs.close()


def test_a_converted_folder_is_taken_as_it_is(tmp_path: Path, tiny_llama: Any) -> None:
    first = import_model(tmp_path / "models", tiny_llama.write_folder(tmp_path / "hf"), "tiny")
    again = import_model(tmp_path / "other", first.directory, "moved")
    assert again.manifest.name == "moved" and build.verify(again.directory) == again.manifest
    np.testing.assert_array_equal(compute(again), compute(first))
    repeated = import_model(tmp_path / "other", first.directory, "moved")
    assert repeated.report == ("it was here already",)


@pytest.mark.parametrize("unsigned", [False, True])
def test_bytes_are_kept_as_the_cpu_multiplies_them(
    tmp_path: Path, tiny_llama: Any, unsigned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways hold the same weights, and are two versions. What is unsigned is exact everywhere, the other only with int8 units."""
    source = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    here = import_model(tmp_path / "models", source, "tiny", "int8")
    monkeypatch.setattr("workers.artifacts.integer.integers_add_up", lambda: not unsigned)
    # what a conversion reports is measured by running it
    monkeypatch.setattr("workers.engine.sessions.integers_add_up", lambda: True)
    made = import_model(tmp_path / "others", source, "tiny", "int8")
    assert made.manifest.unsigned_weights == unsigned
    assert (made.manifest.version == here.manifest.version) == (unsigned == here.manifest.unsigned_weights)
    if unsigned == here.manifest.unsigned_weights:
        np.testing.assert_array_equal(compute(made), compute(here))
    elif unsigned:  # the digits of activations are smaller
        np.testing.assert_allclose(compute(made), compute(here), rtol=0.02, atol=0.02)
    monkeypatch.setattr("workers.engine.sessions.integers_add_up", lambda: False)
    if unsigned:
        assert import_model(tmp_path / "copies", made.directory, "moved").manifest.unsigned_weights
    else:
        with pytest.raises(ArtifactError, match="was converted for CPUs with int8 units"):
            import_model(tmp_path / "copies", made.directory, "moved")


def test_llama_3s_stretched_rotations(tmp_path: Path, tiny_llama: Any) -> None:
    """Both sources say the same: GGUF by factors, the configuration by the rule that makes them."""
    folder = tiny_llama.write_folder(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config["rope_scaling"] = scaling | {"original_max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    stretched = import_model(tmp_path / "models", folder, "stretched", "fp32")
    plain = import_model(tmp_path / "models", tiny_llama.write_gguf(tmp_path / "t.gguf"), "plain", "fp32")
    assert np.abs(compute(stretched) - compute(plain)).max() > 1e-3
    config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="yarn"):
        import_model(tmp_path / "models", folder, "stretched", "fp32")


# --- what is refused -------------------------------------------------------------------------------------------------------------


def cut(source: Path, _: Path) -> Path:
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 2 // 3])
    return source


def cut_early(source: Path, _: Path) -> Path:
    source.write_bytes(source.read_bytes()[:700])
    return source


def claim_much(source: Path, _: Path) -> Path:
    """Claim 2^60 tensors."""
    data = bytearray(source.read_bytes())
    data[8:16] = struct.pack("<Q", 1 << 60)
    source.write_bytes(bytes(data))
    return source


def noise(source: Path, _: Path) -> Path:
    source.write_bytes(b"GGUF" + np.random.default_rng(1).bytes(5000))
    return source


def no_gguf(source: Path, _: Path) -> Path:
    source.write_bytes(b"MZ" + bytes(100))
    return source


def poison(source: Path, _: Path) -> Path:
    """Put a NaN into the last matrix."""
    data = bytearray(source.read_bytes())
    data[-64:] = struct.pack("<f", float("nan")) * 16
    source.write_bytes(bytes(data))
    return source


def pickled(source: Path, folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    return folder


def disguised(source: Path, folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    return folder


def short_weights(source: Path, folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return folder


def wrong_shape(source: Path, folder: Path) -> Path:
    return change(folder, "config.json", intermediate_size=32)


def absurd(source: Path, folder: Path) -> Path:
    return change(folder, "config.json", num_hidden_layers=10**9)


def other_kind(source: Path, folder: Path) -> Path:
    return change(folder, "config.json", model_type="mamba")


def no_number(source: Path, folder: Path) -> Path:
    return change(folder, "config.json", hidden_size="many")


def no_tokenizer(source: Path, folder: Path) -> Path:
    (folder / "tokenizer.json").unlink()
    return folder


def broken_tokenizer(source: Path, folder: Path) -> Path:
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"')
    return folder


def large_tokenizer(source: Path, folder: Path) -> Path:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"more{i}" for i in range(9)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def foreign_onnx(source: Path, folder: Path) -> Path:
    other = folder / "onnx"
    other.mkdir()
    (other / "model.onnx").write_bytes(b"x")
    return other


def change(folder: Path, name: str, **values: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


BROKEN: list[tuple[Callable[[Path, Path], Path], str]] = [
    (cut, "not a whole GGUF file"),
    (cut_early, "not a whole GGUF file"),
    (claim_much, "not a whole GGUF file"),
    (noise, "not a whole GGUF file"),
    (no_gguf, "is not a GGUF file"),
    (poison, "not finite"),
    (pickled, "pickles"),
    (disguised, "not a whole safetensors file"),
    (short_weights, "not a whole safetensors file"),
    (wrong_shape, "has the shape"),
    (absurd, "dimensions that cannot be"),
    (other_kind, "'mamba' model"),
    (no_number, "no number"),
    (no_tokenizer, "tokenizer.json"),
    (broken_tokenizer, "tokenizer.json cannot be read"),
    (large_tokenizer, "the tokenizer knows 53 tokens"),
    (foreign_onnx, "without config.json"),
    (lambda source, folder: folder / "nowhere", "there is no file or folder"),
]


@pytest.mark.parametrize(("breaking", "reason"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_broken_and_hostile_sources_are_refused(
    tmp_path: Path,
    tiny_llama: Any,
    breaking: Callable[[Path, Path], Path],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    broken = breaking(source, tiny_llama.write_folder(tmp_path / "hf"))
    models = tmp_path / "models"
    models.mkdir()
    assert main(["import", str(broken), "--name", "tiny", "--models-dir", str(models)]) == 1
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1, said
    assert [path.name for path in models.iterdir() if path.name != ".lock"] == []


def spoil(data: bytes, draw: random.Random) -> bytes:
    """Flip a bit, overwrite eight bytes with a number of the kind that lengths are, or leave some out; near the head, mostly."""
    spoilt = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(min(6000, len(spoilt)))
        how = draw.randrange(3)
        if how == 0:
            spoilt[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            spoilt[at : at + 8] = draw.choice([0, 1, 2**31, 2**40, 2**63 - 1]).to_bytes(8, "little")
        else:
            del spoilt[at : at + draw.randrange(1, 50)]
    return bytes(spoilt)


@pytest.mark.parametrize("kind", ["gguf", "safetensors", "config", "tokenizer"])
def test_spoilt_sources_end_in_one_line_or_in_a_model(tmp_path: Path, tiny_llama: Any, kind: str) -> None:
    """The same way of spoiling found nothing else in 2,500 imports."""
    source, folder = tiny_llama.write_gguf(tmp_path / "tiny.gguf"), tiny_llama.write_folder(tmp_path / "hf")
    names = {"safetensors": "model.safetensors", "config": "config.json", "tokenizer": "tokenizer.json"}
    path, given = (source, source) if kind == "gguf" else (folder / names[kind], folder)
    whole, draw, models = path.read_bytes(), random.Random(7), tmp_path / "models"
    for _ in range(20):
        path.write_bytes(spoil(whole, draw))
        before = len(list_manifests(models))
        try:
            made = import_model(models, given, "tiny", "fp32")
        except ArtifactError as error:
            assert "\n" not in str(error) and len(list_manifests(models)) == before
        else:
            assert build.verify(made.directory) == made.manifest
        assert not list(models.glob(".work-*"))


def test_changed_copies_are_refused(tmp_path: Path, tiny_llama: Any) -> None:
    made = import_model(tmp_path / "models", tiny_llama.write_gguf(tmp_path / "t.gguf"), "tiny")
    for name in (TOKENIZER_FILE, "model.onnx"):
        copy = tmp_path / f"copy-{name}"
        shutil.copytree(made.directory, copy)
        with (copy / name).open("ab") as file:
            file.write(b" ")
        with pytest.raises(ArtifactError, match="was changed"):
            import_model(tmp_path / "other", copy, "moved")
    escaping = tmp_path / "escaping"
    shutil.copytree(made.directory, escaping)
    change(escaping, MANIFEST_FILE, files={"../../etc/passwd": "0" * 64})
    with pytest.raises(ArtifactError, match="lists other files"):
        import_model(tmp_path / "other", escaping, "moved")
    assert list_manifests(tmp_path / "other") == []


def test_names_that_cannot_be_asked_for_are_refused(tmp_path: Path, tiny_llama: Any) -> None:
    source = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    for name in ("", "../up", "Big", "a b", "x" * 101, "a.b"):
        with pytest.raises(ArtifactError, match="no name for a model"):
            import_model(tmp_path / "models", source, name)


def test_other_tensors_mean_another_model(tmp_path: Path, tiny_llama: Any) -> None:
    folder = tiny_llama.write_folder(tmp_path / "hf")
    weights = tiny_llama.weights()

    class More(type(tiny_llama)):  # type: ignore[misc]
        def weights(self, seed: int = 7) -> Any:
            return weights | {"blk.0.ffn_gate_inp.weight": np.zeros((2, 64), np.float32)}

    more = More(**dataclasses.asdict(tiny_llama)).write_gguf(folder / "more.gguf", gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(ArtifactError, match="does not compute"):
        import_model(tmp_path / "models", more, "tiny", "fp32")


def test_who_imports_a_model_that_lost_much_is_told_what_to_do() -> None:
    lost = Quality(702, 35.17, fp32_perplexity=29.43, greedy_agreement=0.646, divergence=0.4).describe()
    assert len(lost) == 2 and "20% more" in lost[1] and "--quantize" in lost[1]
    kept = Quality(702, 29.63, fp32_perplexity=29.43, greedy_agreement=0.942, divergence=0.01).describe()
    assert len(kept) == 1
