"""The official OpenAI client and the rest of the API: completions, responses, files and batches, against the running stack."""

import contextlib
import json
import resource
import socket
import time

import openai
import pytest
from openai import OpenAI

from tests.e2e.conftest import CHAT_MODEL, EMBED_MODEL, Stack, wait_until

pytestmark = pytest.mark.stack


def test_hundreds_of_open_tabs_keep_nobody_out(client: OpenAI, stack: Stack) -> None:
    """Granian's own limit of 1,024 connections would leave the next one without an answer (D1)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    with contextlib.ExitStack() as tabs:
        for _ in range(1_100):
            tab = tabs.enter_context(socket.create_connection(("127.0.0.1", stack.port), timeout=20))
            tab.sendall(b"GET /v1/nothing HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
            assert tab.recv(12) == b"HTTP/1.1 404"
        assert client.with_options(timeout=20).models.list().data


def test_completes_a_text(client: OpenAI) -> None:
    answer = client.completions.create(
        model=CHAT_MODEL, prompt=["The capital of France is", "Two and two is"], max_tokens=8, temperature=0, echo=True
    )
    assert "Paris" in answer.choices[0].text and answer.choices[1].text.startswith("Two and two is")
    stream = client.completions.create(
        model=CHAT_MODEL, prompt="The capital of France is", max_tokens=8, temperature=0, echo=True, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_makes_and_continues_responses(client: OpenAI) -> None:
    first = client.responses.create(
        model=CHAT_MODEL,
        input="What is the capital of France?",
        instructions="Answer in one short sentence.",
        max_output_tokens=32,
        temperature=0,
    )
    assert first.status == "completed" and "Paris" in first.output_text
    assert first.usage is not None and first.usage.output_tokens > 1
    with client.responses.stream(
        model=CHAT_MODEL,
        input="And of Italy?",
        previous_response_id=first.id,
        max_output_tokens=24,
        temperature=0,
    ) as stream:
        kinds = [event.type for event in stream]
        second = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    assert kinds.count("response.output_text.delta") > 2
    assert client.responses.retrieve(second.id).output_text == second.output_text
    items = client.responses.input_items.list(second.id)
    assert [item.content[0].text for item in items] == ["And of Italy?"]  # type: ignore[union-attr]
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)


def test_a_background_response_is_cancelled(client: OpenAI) -> None:
    made = client.responses.create(model=CHAT_MODEL, input="Count to 1000.", background=True, max_output_tokens=2000)
    assert made.status == "in_progress"
    assert client.responses.cancel(made.id).status in ("cancelled", "completed")


def make_file(count: int) -> bytes:
    def body(number: int) -> dict[str, object]:
        said = [{"role": "user", "content": f"Name a word that begins with the letter {chr(65 + number % 26)}."}]
        return {"model": CHAT_MODEL, "messages": said, "max_tokens": 12, "temperature": 0}

    lines = [
        {"custom_id": f"n{number}", "method": "POST", "url": "/v1/chat/completions", "body": body(number)}
        for number in range(count)
    ]
    return "\n".join(map(json.dumps, lines)).encode()


def test_runs_a_batch_and_survives_kill_9_of_its_process(client: OpenAI, healthy: Stack) -> None:
    """M7: whatever dies in the middle, each line is answered once and charged once."""
    file = client.files.create(file=("lines.jsonl", make_file(32)), purpose="batch")
    assert client.files.retrieve(file.id).bytes == file.bytes
    count_answered = (
        "SELECT count(*), coalesce(sum(completion_tokens), 0) FROM spend_usagerecord WHERE source = 'batch' "
        "AND finish_reason IN ('stop', 'length')"
    )
    [before] = healthy.query(count_answered)
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")

    def count() -> int:
        counts = client.batches.retrieve(batch.id).request_counts
        return counts.completed if counts else 0

    wait_until(lambda: count() >= 3, 60, healthy.read_logs)
    healthy.kill("tasks")
    assert client.batches.retrieve(batch.id).status in ("in_progress", "finalizing", "completed")
    wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", 110, healthy.read_logs)
    done = client.batches.retrieve(batch.id)
    assert done.request_counts is not None and done.output_file_id is not None and done.error_file_id is None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (32, 32, 0)
    lines = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    assert [line["custom_id"] for line in lines] == [f"n{number}" for number in range(32)]
    assert all(line["response"]["body"]["choices"][0]["message"]["content"] for line in lines)

    def is_settled() -> bool:
        [after] = healthy.query("SELECT count(*) FROM spend_usagerecord WHERE source = 'batch' AND cost_nanousd > 0")
        return bool(after[0] - before[0] >= 32)

    wait_until(is_settled, 20, healthy.read_logs)
    time.sleep(1)
    [(jobs, tokens)] = healthy.query(count_answered)
    assert jobs - before[0] == 32
    told = sum(line["response"]["body"]["usage"]["completion_tokens"] for line in lines)
    assert tokens - before[1] == told
    assert done.usage is not None and (done.usage.output_tokens, done.model) == (told, CHAT_MODEL)
    assert [batch.id for batch in client.batches.list()] == [done.id]
    client.files.delete(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_embeddings_in_a_batch(client: OpenAI) -> None:
    line = {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"model": EMBED_MODEL, "input": "sea"}}
    file = client.files.create(file=("e.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", 60)
    done = client.batches.retrieve(batch.id)
    [answer] = client.files.content(str(done.output_file_id)).text.splitlines()
    alone = client.embeddings.create(model=EMBED_MODEL, input="sea", encoding_format="float")
    body = json.loads(answer)["response"]["body"]
    assert body["data"][0]["embedding"] == pytest.approx(alone.data[0].embedding, abs=1e-6)
