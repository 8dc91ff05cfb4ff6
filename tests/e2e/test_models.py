"""A model that somebody brings is served within seconds, in two versions side by side, without a restart."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from tokenizers import Tokenizer

from tests.e2e.conftest import CHAT_MODEL, Stack, wait_until
from tests.workers.exports import write_bert
from tests.workers.plain_bert import classify
from tests.workers.test_imports import change
from tests.workers.tiny import TinyLlama

pytestmark = pytest.mark.stack
NAME = "tiny-qwen3"


@contextmanager
def forgetting(stack: Stack, client: OpenAI, name: str) -> Iterator[None]:
    yield
    stack.manage(
        "shell", "-c", f"from apps.inference.models import Model; Model.objects.filter(slug={name!r}).delete()"
    )
    shutil.rmtree(stack.models_dir / name)
    wait_until(lambda: name not in [model.id for model in client.models.list()], 20)


@pytest.fixture
def imported(healthy: Stack, client: OpenAI, tmp_path: Path) -> Iterator[Path]:
    source = TinyLlama(architecture="qwen3").write_gguf(tmp_path / "tiny.gguf")
    said = healthy.manage("import_model", str(source), "--name", NAME, "--quantize", "int8")
    assert "catalog: new" in said and "the likeliest token is fp32's" in said
    with forgetting(healthy, client, NAME):
        yield source


def test_an_imported_model_and_its_versions(healthy: Stack, client: OpenAI, imported: Path) -> None:
    def chat(**more: Any) -> Any:
        say: list[Any] = [{"role": "user", "content": "hello tea"}]
        # past the answers that are known: they do not ask a worker
        headers = {"cache-control": "no-cache, no-store"}
        return client.chat.completions.create(
            model=NAME, messages=say, max_tokens=3, temperature=0, extra_headers=headers, **more
        )

    wait_until(lambda: healthy.get_ready()[0] == 200, 60, healthy.read_logs)
    first = chat()
    assert first.usage is not None and first.usage.prompt_tokens > 4
    facts = client.models.retrieve(NAME).model_dump()["aiscale"]
    assert f"fp_{facts['version']}" == first.system_fingerprint
    assert facts["batch_invariant"] and "chat.completions" in facts["endpoints"] and facts["precision"] == "int8"

    said = healthy.manage("import_model", str(imported), "--name", NAME, "--quantize", "fp32")
    other = next(path.name for path in (healthy.models_dir / NAME).iterdir() if path.name != facts["version"])
    assert f"version {other} stands beside {facts['version']}" in said
    healthy.manage("model_traffic", NAME, "--canary", other, "--weight", "50")
    seen: set[str] = set()
    ends_at = time.monotonic() + 60
    while len(seen) < 2 and time.monotonic() < ends_at:
        seen.add(chat().system_fingerprint)
    assert seen == {f"fp_{facts['version']}", f"fp_{other}"}
    for version in (facts["version"], other):
        wait_until(
            lambda version=version: re.search(rf'engine_running{{.*"worker-.*"{version}"', healthy.read_metrics()), 20
        )
    healthy.manage("model_traffic", NAME, "--promote", other)
    wait_until(lambda: chat().system_fingerprint == f"fp_{other}", 30)
    healthy.manage("model_traffic", NAME, "--roll-back", "--reason", "It is no better")
    wait_until(lambda: chat().system_fingerprint == first.system_fingerprint, 30)
    assert chat().choices[0].message.content == first.choices[0].message.content


def test_a_canary_may_have_words_of_its_own(healthy: Stack, client: OpenAI, imported: Path) -> None:
    """Another vocabulary, with other numbers for the same words: texts go to both versions, each in its own tokens; ids to the main one."""
    wait_until(lambda: healthy.get_ready()[0] == 200, 60, healthy.read_logs)
    main = client.models.retrieve(NAME).model_dump()["aiscale"]["version"]
    other = TinyLlama(architecture="qwen3", merges=("t e", "te a", "Ġ h", "o u"))
    healthy.manage("import_model", str(other.write_gguf(imported.with_name("o.gguf"))), "--name", NAME)
    canary = next(path.name for path in (healthy.models_dir / NAME).iterdir() if path.name != main)
    healthy.manage("model_traffic", NAME, "--canary", canary, "--weight", "60")

    headers = {"cache-control": "no-cache, no-store"}
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 4, "temperature": 0, "extra_headers": headers}

    def chat(**more: Any) -> tuple[str, int, str]:
        answer = client.chat.completions.create(messages=[{"role": "user", "content": "hello tea"}], **asked, **more)
        assert answer.usage is not None
        text = answer.choices[0].message.content or ""
        return (answer.system_fingerprint or "").removeprefix("fp_"), answer.usage.prompt_tokens, text

    wait_until(lambda: chat()[0] == canary, 60, healthy.read_logs)
    found = {chat() for _ in range(24)}
    assert {each[:2] for each in found} == {(main, 6), (canary, 7)}, "hel-l-o- t-e-a, and h-e-l-l-o- -tea"
    assert len(found) == 2, "each says the same each time"
    assert {chat(logit_bias={"7": 1})[0] for _ in range(8)} == {main}
    text = {client.completions.create(prompt="hello tea", **asked).system_fingerprint for _ in range(16)}
    assert text == {f"fp_{main}", f"fp_{canary}"}
    by_ids = [client.completions.create(prompt=[5, 6, 7], **asked).system_fingerprint for _ in range(8)]
    assert set(by_ids) == {f"fp_{main}"}


def test_an_imported_classifier_judges_texts(healthy: Stack, client: OpenAI, tmp_path: Path) -> None:
    """By the moderations' address, when it is named: what moderates by default does not change, though the name comes first."""
    folder, name = tmp_path / "export", "a-moods"
    weights = write_bert(folder, TinyLlama().write_folder(tmp_path / "hf"), labels=2)
    labels = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "calm", "1": "angry"}}
    change(folder, "config.json", **labels)
    said = healthy.manage("import_model", str(folder), "--name", name, "--quantize", "fp32")
    assert "catalog: new" in said
    with forgetting(healthy, client, name):
        wait_until(lambda: healthy.get_ready()[0] == 200, 60, healthy.read_logs)
        facts = client.models.retrieve(name).model_dump()["aiscale"]
        assert (facts["kind"], facts["labels"], facts["endpoints"]) == ("classify", ["calm", "angry"], ["moderations"])
        long = "hello tea " * 40
        [first, worst] = client.moderations.create(model=name, input=["hel", long]).model_dump()["results"]
        tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("hel").ids
        expected = classify(weights, tokens, layers=2, heads=4, one=True)
        found = [first["category_scores"][label] for label in ("calm", "angry")]
        assert found == pytest.approx(expected.tolist(), abs=1e-4)
        assert first["categories"]["angry"] == bool(expected[1] >= 0.5) and not first["categories"]["violence"]
        assert worst["category_scores"]["calm"] + worst["category_scores"]["angry"] >= 0.999, (
            "of its pieces, the highest"
        )
        assert client.moderations.create(input="hello").model == "moderation"


def test_what_was_said_before_is_not_computed_again(healthy: Stack, client: OpenAI) -> None:
    """The keys and values of a shared beginning and of earlier turns are reused, which usage tells; the answers are the same."""
    turns: list[Any] = [
        {"role": "system", "content": "You answer in one short sentence, kindly, and never speak of yourself. " * 3},
        {"role": "user", "content": f"Name a colour. ({time.time()})"},
    ]

    def ask() -> tuple[str, int, int]:
        answer = client.chat.completions.create(
            model=CHAT_MODEL,
            messages=turns,
            max_tokens=8,
            temperature=0,
            extra_headers={"cache-control": "no-cache, no-store"},
        )
        usage = answer.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        return (
            answer.choices[0].message.content or "",
            usage.prompt_tokens,
            usage.prompt_tokens_details.cached_tokens or 0,
        )

    text, prompt_tokens, _ = ask()
    again, _, cached_tokens = ask()
    assert again == text and cached_tokens == prompt_tokens - 2, "all but the last two"
    turns.extend([{"role": "assistant", "content": text}, {"role": "user", "content": "Another one."}])
    _, longer, cached_tokens = ask()
    assert longer > prompt_tokens and cached_tokens >= prompt_tokens - 4
    wait_until(lambda: re.search(r'engine_prefix_tokens_total{.*kind="reused".*} [1-9]', healthy.read_metrics()), 20)
