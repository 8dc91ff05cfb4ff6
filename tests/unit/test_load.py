"""The benchmarks' load generator counts every request once: answered, refused, or broken."""

import contextlib
import socketserver
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from deploy.bench.load import make_request, run_closed, run_open

SLOW_S = 0.01


class Answers(socketserver.StreamRequestHandler):
    """Answer kept-alive requests as their path says: /ok, /busy, /slow, which takes its time, or /gone, which hangs up."""

    def handle(self) -> None:
        # a generator whose time is over hangs up in the middle of an answer
        with contextlib.suppress(ConnectionError):
            self._answer_all()

    def _answer_all(self) -> None:
        while line := self.rfile.readline():
            length = 0
            while (header := self.rfile.readline()) not in (b"\r\n", b""):
                if header.startswith(b"content-length:"):
                    length = int(header.split(b":")[1])
            self.rfile.read(length)
            if not line.endswith(b"\n"):
                return  # cut off in mid-line, as wrk leaves at its end
            path = line.split()[1]
            if path == b"/gone":
                return
            if path == b"/slow":
                time.sleep(SLOW_S)
            status, body = (b"503 Service Unavailable", b"no") if path == b"/busy" else (b"200 OK", b"x" * 100_000)
            head = b"HTTP/1.1 %s\r\nx-aiscale-cache: l1\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
            self.wfile.write(head + body)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.errors: list[BaseException | None] = []

    def handle_error(self, request: object, client_address: object) -> None:
        self.errors.append(sys.exc_info()[1])


@pytest.fixture
def port() -> Iterator[int]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield int(server.server_address[1])
        server.shutdown()
    assert not server.errors


def cycle(*paths: str) -> Iterator[bytes]:
    while True:
        yield from (make_request("127.0.0.1", path, "key", b"{}") for path in paths)


def test_an_open_load_counts_every_request_once(port: int) -> None:
    result = run_open("127.0.0.1", port, cycle("/ok", "/busy", "/gone"), per_second=600, seconds=0.5, clients=8)
    assert result.statuses == {200: 100, 503: 100} and result.broken == 100
    assert result.answered == 100 and result.failed == 200
    assert result.levels == {"l1": 200}
    assert result.percentile_ms(99) > 0 and len(result.latencies_s[503]) == 100


def test_latency_counts_from_when_a_request_was_due(port: int) -> None:
    """One connection for a pace that it cannot keep: what waited for it is late, and its wait is in its latency."""
    result = run_open("127.0.0.1", port, cycle("/slow"), per_second=400, seconds=0.1, clients=1)
    assert result.answered == 40
    # by the time that the first is answered, the next is 7.5 ms late, and each after it by 7.5 ms more than the last; a generator that
    # was itself kept waiting sends the first few at once
    assert result.late >= 30
    assert result.percentile_ms(99) > 1000 * (39 * SLOW_S - 0.1)


def test_a_closed_load_asks_again_when_it_is_answered(port: int) -> None:
    result = run_closed("127.0.0.1", port, cycle("/ok"), clients=4, seconds=0.2)
    assert result.answered == result.count > 4 and result.failed == 0
