"""The items of a response stand in the order in which they were made."""

from typing import Any

from aiscale.wire.events import Delta, ToolCallPart
from apps.gateway.responses.output import Output


def make_output(*deltas: tuple[str, list[tuple[int, str]]]) -> Output:
    output, known = Output("resp_1"), set[int]()
    for text, parts in deltas:
        told = []
        for index, arguments in parts:
            head: dict[str, Any] = {} if index in known else {"id": f"call_{index}", "name": "f"}
            known.add(index)
            told.append(ToolCallPart(index=index, arguments=arguments, **head))
        output.add(Delta(job_id="j", seq=0, text=text, completion_tokens=0, tool_calls=tuple(told)))
    return output


def tell(output: Output, *, is_whole: bool = True) -> list[tuple[str, str, str]]:
    told = []
    for item in output.describe(is_whole=is_whole):
        said = item["arguments"] if item["type"] == "function_call" else "".join(p["text"] for p in item["content"])
        told.append((item["id"], said, item["status"]))
    return told


def test_texts_and_calls_keep_their_order() -> None:
    output = make_output(
        ("I ", []), ("look.", [(0, "{")]), ("", [(0, "}"), (1, "{}")]), (" Done", []), ("", [(2, "{}")])
    )
    assert tell(output) == [
        ("msg_1", "I look.", "completed"),
        ("fc_1_0", "{}", "completed"),
        ("fc_1_1", "{}", "completed"),
        ("msg_1_3", " Done", "completed"),
        ("fc_1_2", "{}", "completed"),
    ]


def test_the_end_of_a_call_comes_before_what_is_said_after_it() -> None:
    output = make_output(("", [(0, "{")]), ("And", [(0, "}"), (1, "{")]), ("", [(1, "}")]))
    assert [said for _, said, _ in tell(output)] == ["{}", "And", "{}"]


def test_what_is_cut_is_the_last_item() -> None:
    assert tell(make_output(("So", [(0, "{")])), is_whole=False)[1:] == [("fc_1_0", "{", "incomplete")]
    assert tell(make_output(), is_whole=False) == [("msg_1", "", "incomplete")]
