"""The command converts what somebody has and enters it into the catalog; what cannot be is refused in one line, and enters nothing."""

import dataclasses
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.core.management import CommandError, call_command

from apps.accounts import audit
from apps.inference import catalog, traffic
from apps.inference.models import Model, ModelVersion
from tests.apps.conftest import Cast
from tests.workers.exports import write_bert
from tests.workers.tiny import TinyLlama


def run(settings: Any, models_dir: Path, *arguments: str) -> str:
    settings.ENV = dataclasses.replace(django_settings.ENV, models_dir=models_dir)
    output = StringIO()
    call_command("import_model", *arguments, stdout=output)
    return output.getvalue()


def test_an_imported_model_is_in_the_catalog(cast: Cast, settings: Any, tmp_path: Path) -> None:
    source = TinyLlama(architecture="qwen2").write_gguf(tmp_path / "tiny.gguf")
    said = run(settings, tmp_path / "models", str(source), "--name", "tiny", "--quantize", "int8", "--license", "MIT")
    assert (
        "int8" in said and "quality: perplexity" in said and "catalog: new" in said and "cannot take chats" not in said
    )
    row = Model.objects.get(slug="tiny")
    assert (row.kind, row.context_tokens, row.is_enabled) == ("generate", 160, True)
    assert (tmp_path / "models" / "tiny" / row.version / "manifest.json").is_file()
    assert "tiny" in catalog._read(), "it has a price to start with"
    again = run(settings, tmp_path / "models", str(source), "--name", "tiny", "--quantize", "int8")
    assert "it was here already" in again and "catalog: unchanged" in again


def test_an_encoders_next_version_may_make_longer_vectors(cast: Cast, settings: Any, tmp_path: Path) -> None:
    """What the catalog says of them is what the version makes that answers."""
    words = TinyLlama().write_folder(tmp_path / "hf")
    versions = []
    for hidden in (32, 48):
        write_bert(tmp_path / str(hidden), words, hidden=hidden)
        run(settings, tmp_path / "models", str(tmp_path / str(hidden)), "--name", "vectors", "--quantize", "fp32")
        versions += [each for each in ModelVersion.objects.filter(model__slug="vectors") if each not in versions]
    assert [each.dimensions for each in versions] == [32, 48]
    by = audit.by_system("test")
    assert Model.objects.get(slug="vectors").dimensions == 32
    assert traffic.promote("vectors", versions[1].version, by=by).dimensions == 48
    traffic.roll_back("vectors", by=by, reason="Too long")
    assert Model.objects.get(slug="vectors").dimensions == 32


def test_a_broken_source_enters_nothing(cast: Cast, settings: Any, tmp_path: Path) -> None:
    source = TinyLlama().write_gguf(tmp_path / "tiny.gguf")
    source.write_bytes(source.read_bytes()[:5000])
    with pytest.raises(CommandError, match="not a whole GGUF file"):
        run(settings, tmp_path / "models", str(source), "--name", "tiny")
    assert not Model.objects.filter(slug="tiny").exists()
    assert list((tmp_path / "models").glob("*/*")) == []
