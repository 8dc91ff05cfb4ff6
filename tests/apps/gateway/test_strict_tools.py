"""Strict tools of models of our own, where the model may choose: the worker and the model are real, the template is Qwen's."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.apps.conftest import Cast, run_worker
from tests.apps.gateway.driver import Exchange
from tests.apps.gateway.test_tools import CHAT, CITY, tooled
from tests.apps.gateway.test_tools_elsewhere import FLAT, THEIRS, read_named, respond, send

__all__ = ["tooled"]
pytestmark = pytest.mark.usefixtures("worker", "tooled")


@pytest.fixture(scope="module")
def worker_process(redis_url: str, served_models_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that computes with the model itself."""
    with run_worker(redis_url, runner="onnx", slots=4) as process:
        yield process


def teach(city: str) -> str:
    return f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


TAUGHT = [
    turn
    for city in ("Rome", "Oslo", "Lima")
    for turn in ({"role": "user", "content": f"How is it in {city}?"}, {"role": "assistant", "content": teach(city)})
] + [{"role": "user", "content": "How is it in Kyiv?"}]
"""After which even a small model calls by itself, for another city than the schema has."""


async def test_strict_tools_are_followed_where_the_model_may_choose(cast: Cast) -> None:
    """In all dialects, whole and streamed; a tool that is not strict shows what the model would have said."""
    free = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
    strict = [{"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}]
    value = {"model": CHAT, "messages": TAUGHT, "max_tokens": 60, "temperature": 0}
    said = {}
    for name, tools in (("free", free), ("strict", strict)):
        asked = Exchange("POST", "/v1/chat/completions", key=cast.raw, value=value | {"tools": tools})
        answer = await asked.read_json()
        assert asked.status == 200, answer
        said[name] = [call["function"]["arguments"] for call in answer["choices"][0]["message"]["tool_calls"]]
    assert json.loads(said["free"][0]) == {"city": "Kyiv"}
    assert said["strict"] and {*said["strict"]} == {'{"city": "Paris"}'}
    events = read_named(
        await respond(cast, input=TAUGHT, parallel_tool_calls=False, stream=True, max_output_tokens=60).read()
    )
    pieces = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert len(pieces) > 2 and json.loads("".join(pieces)) == {"city": "Paris"}
    answer = await send(
        cast, messages=TAUGHT, tools=[THEIRS[0] | {"strict": True}], temperature=0, max_tokens=60
    ).read_json()
    blocks = [block for block in answer["content"] if block["type"] == "tool_use"]
    assert blocks and all(block["input"] == {"city": "Paris"} for block in blocks), answer


async def test_a_strict_tool_leaves_text_alone(cast: Cast) -> None:
    """Who calls nothing says what was said without, and a schema that cannot be followed is refused by the tool's name."""
    loose = await respond(cast, tools=[FLAT[0] | {"strict": False}], max_output_tokens=12).read_json()
    bound = await respond(cast, max_output_tokens=12).read_json()
    assert loose["output"][0]["content"] == bound["output"][0]["content"]
    broken = {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}
    refused = respond(cast, tools=[FLAT[0] | {"parameters": broken}])
    error = (await refused.read_json())["error"]
    assert (refused.status, error["param"]) == (400, "tools") and "'weather'" in error["message"], error
