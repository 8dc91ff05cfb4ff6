"""A refusal does not wait for the event loop, which under overload is what everybody waits for (D1)."""

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from granian import _futures

from aiscale.overload import Crowd
from apps.gateway import doorstep
from tests.apps.inference.test_upstreams import ROOT, find_port

PATIENCE_S = 40


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """Granian with an application that is full and can be stuck."""
    port = find_port()
    command = [sys.executable, "-m", "granian", "--interface", "asginl", "--loop", "uvloop", "--port", str(port)]
    environ = {**os.environ, "DJANGO_SETTINGS_MODULE": "aiscale.settings.test", "STUCK_DIR": str(tmp_path)}
    process = subprocess.Popen([*command, "tests.apps.gateway.stuck_app:application"], cwd=ROOT, env=environ)
    try:
        ends_at = time.monotonic() + PATIENCE_S
        while True:
            try:
                assert ask(port, "GET", "/fill")[0] == 200
                break
            except OSError:
                assert time.monotonic() < ends_at and process.poll() is None, "the application did not come up"
                time.sleep(0.1)
        yield port
    finally:
        (tmp_path / "go").touch()
        process.terminate()
        process.wait(20)


def ask(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, http.client.HTTPMessage, bytes]:
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        answer = http.client.HTTPResponse(connection, method=method)
        answer.begin()
        return answer.status, answer.headers, answer.read()


def test_refusals_come_while_the_loop_stands_still_and_others_when_it_goes_on(port: int, tmp_path: Path) -> None:
    pages: list[bytes] = []
    sticking = threading.Thread(target=lambda: pages.append(ask(port, "GET", "/stick")[2]))
    sticking.start()
    while not (tmp_path / "stuck").exists():
        time.sleep(0.01)
    for path, wanted in (
        ("/v1/embeddings", (503, "server_error")),
        ("/v1/messages", (529, "overloaded_error")),
        ("/v1/chat/completions", (503, "server_error")),
    ):
        status, headers, body = ask(port, "POST", path, b"{}" * 100)
        assert (status, json.loads(body)["error"]["type"]) == wanted
        assert headers["retry-after"] == "1" and str(headers["x-request-id"]).startswith("req_")
    status, _, body = ask(port, "HEAD", "/v1/models")
    assert (status, body) == (503, b"")
    assert sticking.is_alive() and not pages, "the loop stood still all the while"
    page = threading.Thread(target=lambda: pages.append(ask(port, "GET", "/healthz")[2]))
    page.start()
    (tmp_path / "go").touch()
    sticking.join(PATIENCE_S)
    page.join(PATIENCE_S)
    assert set(pages) == {b"/stick", b"/healthz"}, "pages are not refused: they wait"
    assert ask(port, "OPTIONS", "/v1/models")[0] == 503, "what may be a browser's question goes to the loop"


def test_one_is_let_in_when_an_epoch_is_over_and_those_underway_take_places() -> None:
    now_s = 0.0
    crowd = Crowd(0.15, lambda: now_s)
    assert not crowd.is_full(10_000), "who refuses nobody lets all in"
    crowd.places = 2
    assert crowd.enter() and crowd.enter() and crowd.enter() is None
    crowd.places = 4
    assert not crowd.is_full(1) and crowd.is_full(2)
    crowd.places = 2
    assert crowd.is_full(0)
    now_s = 1.0
    assert not crowd.is_full(0), "somebody has to begin the next epoch"
    assert crowd.is_full(1), "one is enough"


def test_what_was_refused_outside_keeps_the_crowd_refusing() -> None:
    now_s = 0.0
    crowd = Crowd(0.15, lambda: now_s)
    crowd.places = 1
    kept = crowd.enter()
    assert kept and crowd.enter() is None
    places = crowd.places
    for _ in range(3):
        crowd.refused_outside += 1_000
        now_s += 1.0
        crowd.enter()
        assert crowd.is_shedding and crowd.places == places, "the flood goes on"
    now_s += 1.0
    crowd.enter()
    assert crowd.places > places or not crowd.is_shedding


def test_another_version_of_granian_refuses_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.delattr(_futures, doorstep.HAND_OVER)
    monkeypatch.setattr(doorstep.log, "warning", said.append)
    assert not doorstep.install() and not hasattr(_futures, doorstep.HAND_OVER)
    assert "event loop" in said[0]
