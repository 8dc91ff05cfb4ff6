"""Share converted models between tests, and the smallest llama there is."""

from pathlib import Path

import pytest

from tests.workers.tiny import TinyLlama
from workers.artifacts import build


@pytest.fixture(scope="session")
def smollm2_dir(models_dir: Path) -> Path:
    [manifest] = build.ensure(models_dir, ["smollm2-135m-instruct"])
    return models_dir / manifest.name / manifest.version


@pytest.fixture(scope="session")
def smollm2_fp32_dir(models_dir: Path) -> Path:
    [manifest] = build.ensure(models_dir, ["smollm2-135m-instruct"], "fp32")
    return models_dir / manifest.name / manifest.version


@pytest.fixture(scope="session")
def minilm_dir(models_dir: Path) -> Path:
    [manifest] = build.ensure(models_dir, ["all-minilm-l6-v2"])
    return models_dir / manifest.name / manifest.version


@pytest.fixture(scope="session")
def tiny_llama() -> TinyLlama:
    return TinyLlama()
