"""Other people's programs against the running stack: Anthropic's client, LangChain, HTTP/2, and clients in JavaScript."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import anthropic
import httpx
import pytest
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

from tests.e2e.conftest import CHAT_MODEL, EMBED_MODEL, ROOT, Stack

pytestmark = pytest.mark.stack
GREEDY = {"temperature": 0}
QUESTION = "What is the capital of France?"
SCRIPTS = ROOT / "tests" / "e2e" / "js"


@pytest.fixture
def claude(healthy: Stack, api_key: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=healthy.base_url, api_key=api_key, max_retries=0, timeout=60) as client:
        yield client


def test_anthropics_client(claude: anthropic.Anthropic) -> None:
    said: list[anthropic.types.MessageParam] = [{"role": "user", "content": QUESTION}]
    anew = {**GREEDY, "cache": {"no-cache": True}}
    answer = claude.messages.create(model=CHAT_MODEL, max_tokens=40, messages=said, extra_body=anew)
    assert answer.content[0].type == "text" and "Paris" in answer.content[0].text
    assert answer.stop_reason == "end_turn" and answer.usage.output_tokens > 1
    assert answer._request_id and answer._request_id.startswith("req_")
    with claude.messages.stream(model=CHAT_MODEL, max_tokens=40, messages=said, extra_body=anew) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == answer.content[0].text and len(pieces) > 2
    assert final.usage.output_tokens == answer.usage.output_tokens
    counted = claude.messages.count_tokens(model=CHAT_MODEL, messages=said)
    assert counted.input_tokens >= answer.usage.input_tokens > 0
    stopped = claude.messages.create(
        model=CHAT_MODEL, max_tokens=40, messages=said, extra_body=GREEDY, stop_sequences=["Paris"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Paris")
    every = [model.id for model in claude.models.list()]
    assert CHAT_MODEL in every and len(every) >= 3
    page = claude.models.list(limit=1)
    assert page.has_more and [model.id for model in page] == every
    assert [model.id for model in claude.models.list(limit=1, before_id=every[-1])] == every[-2::-1]
    schema = {"type": "object", "properties": {"capital": {"type": "string"}}, "required": ["capital"]}
    config: anthropic.types.OutputConfigParam = {"format": {"type": "json_schema", "schema": schema}}
    shaped = claude.messages.create(model=CHAT_MODEL, max_tokens=60, messages=said, output_config=config)
    assert shaped.content[0].type == "text" and "capital" in json.loads(shaped.content[0].text)


def test_anthropics_batches(claude: anthropic.Anthropic) -> None:
    said: list[anthropic.types.MessageParam] = [{"role": "user", "content": QUESTION}]
    made = claude.messages.batches.create(
        requests=[
            {"custom_id": "good", "params": {"model": CHAT_MODEL, "max_tokens": 20, "messages": said}},
            {"custom_id": "bad", "params": {"model": "nobody", "max_tokens": 20, "messages": said}},
        ]
    )
    ends_at = time.monotonic() + 60
    while (batch := claude.messages.batches.retrieve(made.id)).processing_status != "ended":
        assert time.monotonic() < ends_at
        time.sleep(0.5)
    assert (batch.request_counts.succeeded, batch.request_counts.errored) == (1, 1)
    results = {line.custom_id: line.result for line in claude.messages.batches.results(made.id)}
    assert results["good"].type == "succeeded" and results["good"].message.content[0].type == "text"
    assert results["bad"].type == "errored" and results["bad"].error.error.type == "not_found_error"
    assert made.id in [batch.id for batch in claude.messages.batches.list(limit=1)]
    assert claude.messages.batches.delete(made.id).type == "message_batch_deleted"


def test_anthropics_errors(claude: anthropic.Anthropic, healthy: Stack) -> None:
    said: list[anthropic.types.MessageParam] = [{"role": "user", "content": QUESTION}]
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(model="claude-3", max_tokens=5, messages=said)
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(model=CHAT_MODEL, max_tokens=0, messages=said)
    with (
        anthropic.Anthropic(base_url=healthy.base_url, api_key="sk-wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError),
    ):
        stranger.messages.create(model=CHAT_MODEL, max_tokens=5, messages=said)


def test_langchain(healthy: Stack, api_key: str) -> None:
    common = {"base_url": f"{healthy.base_url}/v1", "api_key": api_key}
    chat = ChatOpenAI(model=CHAT_MODEL, temperature=0, max_tokens=40, max_retries=0, **common)  # type: ignore[arg-type,call-arg]
    answer = chat.invoke([("system", "Answer in one short sentence."), ("user", QUESTION)])
    assert "Paris" in str(answer.content) and answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 1
    streamed = "".join(str(chunk.content) for chunk in chat.stream([("user", QUESTION)]))
    assert "Paris" in streamed
    responses = ChatOpenAI(model=CHAT_MODEL, temperature=0, use_responses_api=True, max_tokens=40, **common)  # type: ignore[arg-type,call-arg]
    assert "Paris" in str(responses.invoke(QUESTION).content)
    text = OpenAI(model=CHAT_MODEL, temperature=0, max_tokens=8, **common)  # type: ignore[arg-type,call-arg]
    assert "Paris" in text.invoke("The capital of France is")
    embed = OpenAIEmbeddings(model=EMBED_MODEL, check_embedding_ctx_length=False, **common)  # type: ignore[arg-type]
    vectors = embed.embed_documents(["a cat", "a kitten", "the stock market"])
    assert [len(vector) for vector in vectors] == [384] * 3


def test_http_2_and_connections_that_stay(healthy: Stack, api_key: str) -> None:
    headers = {"authorization": f"Bearer {api_key}"}
    body = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 5, "stream": True}
    with httpx.Client(base_url=healthy.base_url, headers=headers, http1=False, http2=True, timeout=60) as client:
        listed = client.get("/v1/models")
        assert (listed.status_code, listed.http_version) == (200, "HTTP/2")
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert stream.http_version == "HTTP/2" and lines[-1] == "data: [DONE]"
    with httpx.Client(base_url=healthy.base_url, headers=headers) as client:
        streams = [client.get("/v1/models").extensions["network_stream"] for _ in range(5)]
        assert len({id(stream) for stream in streams}) == 1, "the connection was not kept"


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """Packages of the pinned versions, installed once into .cache/js."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not on this machine")
    place = ROOT / ".cache" / "js"
    place.mkdir(parents=True, exist_ok=True)
    lock = (SCRIPTS / "package-lock.json").read_text(encoding="utf-8")
    stamp = place / "installed.json"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != lock:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SCRIPTS / name, place / name)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, timeout=100)
        if done.returncode:
            pytest.skip(f"npm could not install the clients: {done.stderr[-300:]}")
        stamp.write_text(lock, encoding="utf-8")
    return place


@pytest.mark.parametrize("script", ["openai.mjs", "vercel_ai.mjs"])
def test_clients_in_javascript(healthy: Stack, api_key: str, node_modules: Path, script: str) -> None:
    # a module is looked up from where the script is
    shutil.copy(SCRIPTS / script, node_modules / script)
    environ = {
        **os.environ,
        "AISCALE_URL": healthy.base_url,
        "AISCALE_API_KEY": api_key,
        "CHAT_MODEL": CHAT_MODEL,
        "EMBED_MODEL": EMBED_MODEL,
    }
    done = subprocess.run(
        ["node", script], cwd=node_modules, env=environ, capture_output=True, text=True, check=False, timeout=90
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["ok"] >= 5
