"""Read the written table of who may do what (``table.txt``), and write it anew."""

import os
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_name("table.txt")
WRITES = bool(os.environ.get("WRITE_ACCESS_TABLE"))
SECTIONS = {
    "pages": [
        "owner",
        "admin",
        "member",
        "billing",
        "staff",
        "superuser",
        "stranger",
        "nobody",
        "key",
        "manager",
        "revoked",
    ],
    "v1": ["key", "manager", "foreign", "revoked", "wrong", "none", "session"],
    "frames": ["owner", "admin", "member", "billing", "staff", "superuser", "stranger", "nobody", "removed"],
}
"""The columns of each section, in their order."""

_HEAD = """\
# Who may do what: every URL, every route of /v1 and every frame of the WebSocket, asked by everybody.
#
# The organization Acme has an owner, an admin, a member and somebody for billing. What a route names is the member's (<key_id>,
# <conversation_id>, <member_id>) or Acme's. Not in Acme: staff (may enter the admin and has no rights there), superuser, stranger (has an
# organization of their own), removed (was a member) and nobody (not logged in). key, manager and revoked are API keys of Acme's owner
# without a session: a plain one, one that manages the organization, and one that was revoked; foreign is the stranger's key.
#
# An outcome is a status, or login for who is sent to log in; for frames the type of the answer, an error's code or the code of the close.
# To change it: WRITE_ACCESS_TABLE=1 pytest tests/apps/access, then read the difference line by line.
"""


class Row(NamedTuple):
    """Expect, for one method of one route, an outcome of each column."""

    method: str
    route: str
    outcomes: tuple[str, ...]


def read_table(section: str) -> list[Row]:
    """Return a section's rows. A line is a method, a route and an outcome for each column; ``#`` begins a remark."""
    rows, current = [], ""
    for line in PATH.read_text(encoding="utf-8").splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        if words[0].startswith("["):
            current = words[0].strip("[]")
        elif current == section:
            assert len(words) == 2 + len(SECTIONS[section]), line
            rows.append(Row(words[0], words[1], tuple(words[2:])))
    return rows


def compare(section: str, found: list[Row]) -> None:
    """Raise: AssertionError, with the rows as they are, when the table says something else."""
    told = read_table(section)
    ours = [row for row in told if (row.method, row.route) in {(each.method, each.route) for each in found}]
    wrong = [row for row in found if row not in ours]
    if wrong and WRITES:
        known = {(row.method, row.route): row for row in told} | {(row.method, row.route): row for row in found}
        _write(section, list(known.values()))
        return
    assert not wrong, f"{PATH.name} does not say, in [{section}]:\n" + "\n".join(write_row(row) for row in wrong)


def forget_others(section: str, known: list[tuple[str, str]]) -> None:
    """Raise: AssertionError when the table has other rows than these."""
    told = read_table(section)
    if WRITES:
        by_route = {(row.method, row.route): row for row in told}
        _write(section, [by_route[each] for each in known if each in by_route])
        return
    assert {(row.method, row.route) for row in told} == set(known)


def write_row(row: Row) -> str:
    return f"{row.method:<6} {row.route:<76} " + " ".join(f"{outcome:<9}" for outcome in row.outcomes).rstrip()


def _write(section: str, rows: list[Row]) -> None:
    text = _HEAD
    for name, columns in SECTIONS.items():
        text += f"\n[{name}]\n{write_row(Row('#', '', tuple(columns)))}\n"
        text += "".join(write_row(row) + "\n" for row in (rows if name == section else read_table(name)))
    PATH.write_text(text, encoding="utf-8")
