"""Share converted models between tests, and the smallest llama there is."""

import tempfile
from pathlib import Path

import pytest

from tests.workers.tiny import TinyLlama
from workers.artifacts import build
from workers.artifacts.fetch import fetch


@pytest.fixture(scope="session")
def smollm2_dir(models_dir: Path) -> Path:
    [manifest] = build.ensure(models_dir, ["smollm2-135m-instruct"])
    return models_dir / manifest.name / manifest.version


@pytest.fixture(scope="session")
def smollm2_fp32_dir(models_dir: Path) -> Path:
    [manifest] = build.ensure(models_dir, ["smollm2-135m-instruct"], "fp32")
    return models_dir / manifest.name / manifest.version


@pytest.fixture(scope="session")
def smollm2_gguf(models_dir: Path) -> Path:
    """The file that SmolLM2 ships in, fetched once beside the models."""
    model = build.find_model("smollm2-135m-instruct")
    path = models_dir / "sources" / model.files[0].name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fetch(model, Path(folder))[path.name].rename(path)
    return path


@pytest.fixture(scope="session")
def minilm_dir(models_dir: Path) -> Path:
    [manifest] = build.ensure(models_dir, ["all-minilm-l6-v2"])
    return models_dir / manifest.name / manifest.version


@pytest.fixture(scope="session")
def tiny_llama() -> TinyLlama:
    return TinyLlama()
