"""Alike questions on the real stack: the real embedding model decides what is alike, the real model answers."""

import time
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import CHAT_MODEL, Stack, wait_until

pytestmark = pytest.mark.stack

ASKED = "What is the capital of France?"
PARAPHRASES = [
    "What's the capital of France?",
    "Tell me the capital of France.",
    "Which city is the capital of France?",
    "Please tell me: what is the capital of France?",
    "Can you tell me the capital of France?",
    "Name the capital of France, please.",
]


def ask(stack: Stack, key: str, said: str, system: str = "Be brief.", **more: Any) -> tuple[str | None, str]:
    """Return where the answer came from, and the answer."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": said}]
    value = {"model": CHAT_MODEL, "messages": messages, "temperature": 0, "max_tokens": 8, **more}
    headers = {"authorization": f"Bearer {key}"}
    answer = httpx.post(f"{stack.base_url}/v1/chat/completions", json=value, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.headers.get("x-aiscale-cache"), answer.json()["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def stranger(stack: Stack) -> str:
    """A key of another organization, which wishes the same."""
    return opt_in(stack, "stranger@example.com")


def opt_in(stack: Stack, email: str) -> str:
    """Return a key of an organization whose alike questions share answers."""
    key = stack.manage("create_api_key", "--email", email, "--plan", "enterprise", "--manage")
    client = httpx.Client(base_url=f"{stack.base_url}/api/v1", headers={"authorization": f"Bearer {key}"})
    with client:
        [organization] = client.get("/organizations").raise_for_status().json()["data"]
        value = {"semantic_cache": True, "semantic_max_error_percent": 10}
        client.patch(f"/organizations/{organization['id']}", json=value).raise_for_status()
    return key


def test_paraphrases_hit_and_nothing_else_does_c2(healthy: Stack, stranger: str) -> None:
    """C2: no hash of the whole request stands before the look-up, so other words for the same find the answer. C1: never another's."""
    key = opt_in(healthy, "alike@example.com")
    # what a hundred questions teach: its answer was right, and there is room for a risk
    learned = "UPDATE inference_semanticentry SET observations = %s::jsonb RETURNING organization_id"
    seen = str([[similarity / 100, True] for similarity in range(75, 100)]).replace("True", "true")
    _, answer = ask(healthy, key, ASKED)
    assert "Paris" in answer
    spaces = iter(range(1, 100))
    answers = {answer}

    def teach() -> list[tuple[Any, ...]]:
        # a busy machine takes longer than a look-up may: then nothing was learned
        time.sleep(0.3)
        rows = healthy.query(learned, seen)
        if not rows:
            answers.add(ask(healthy, key, ASKED + " " * next(spaces))[1])
        return rows

    organization = wait_until(teach, 60, healthy.read_logs)[0][0]
    healthy.query(
        "UPDATE inference_semanticaccount SET lookups = 1000 WHERE organization_id = %s RETURNING 1", organization
    )
    wordings = (opening + said for opening in ("", "Please: ", "Quick: ", "So: ", "Now: ") for said in PARAPHRASES)
    hits: list[str] = []

    def hit() -> bool:
        level, said = ask(healthy, key, next(wordings))
        if level == "semantic":
            hits.append(said)
        else:
            answers.add(said)
        return len(hits) == 3

    wait_until(hit, 60, healthy.read_logs)
    # the small model may word an answer to other words otherwise: a hit is what some miss was answered
    assert set(hits) <= answers
    for more in ({"system": "Answer in French."}, {"seed": 3}, {"n": 2}, {"max_tokens": 9}):
        assert ask(healthy, key, "Tell me: what is the capital of France?", **more)[0] == "miss", more
    assert ask(healthy, key, "How do I bake bread at home?")[0] == "miss"
    assert ask(healthy, stranger, PARAPHRASES[0])[0] == "miss"
    report = httpx.get(
        f"{healthy.base_url}/api/v1/organizations/{organization}/cache", headers={"authorization": f"Bearer {key}"}
    ).json()
    assert report["semantic"]["lookups"] >= 1003 and report["semantic"]["expected_wrong_percent"] < 10
