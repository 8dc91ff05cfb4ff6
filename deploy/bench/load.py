"""Ask an HTTP server many times over kept-alive connections, cheaply: a load generator for the benchmarks on the same machine.

A request is bytes that were made beforehand, and the connections are watched with epoll and nothing above it, so that one request costs
this process some thirty microseconds and not the server's share of the cores.
"""

import select
import socket
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

HEAD_END = b"\r\n\r\n"
LENGTH, LEVEL = b"\r\ncontent-length:", b"\r\nx-aiscale-cache:"
READ_BYTES = 1 << 16
ANSWER_TIMEOUT_S = 30.0
"""How long answers are waited for when all is asked; what is missing then is broken."""


@dataclass
class Result:
    """Hold what was seen: latencies in seconds by status, and the cache's levels."""

    latencies_s: "dict[int, array[float]]" = field(default_factory=dict)
    levels: Counter[str] = field(default_factory=Counter)
    waits_s: "dict[int, array[float]]" = field(default_factory=dict)
    """The same from when the request was sent, which under an open load is later than when it was due where all connections are busy."""
    late: int = 0
    """Requests of an open load that found no free connection when they were due: they were sent later, and their wait counts."""
    broken: int = 0
    """Requests whose connection ended, or that were not answered."""
    elapsed_s: float = 0.0

    @property
    def statuses(self) -> dict[int, int]:
        return {status: len(seen) for status, seen in sorted(self.latencies_s.items())}

    @property
    def count(self) -> int:
        return sum(self.statuses.values())

    @property
    def answered(self) -> int:
        return self.statuses.get(200, 0)

    @property
    def failed(self) -> int:
        return self.count - self.answered + self.broken

    def percentile_ms(self, percent: float, statuses: Iterable[int] = (200,), *, from_sent: bool = False) -> float:
        """Return the latency that so many percent of the answers with these statuses stay below."""
        seen = self.waits_s if from_sent else self.latencies_s
        ordered = sorted(value for status in statuses for value in seen.get(status, ()))
        return 1000 * ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)] if ordered else 0.0


class Connection:
    """Hold one connection, and the answer that it is waiting for."""

    __slots__ = ("buffer", "due_s", "is_busy", "sent_s", "socket", "wanted")

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.buffer, self.due_s, self.sent_s, self.is_busy, self.wanted = b"", 0.0, 0.0, False, 0


class Generator:
    """Drive all connections from one thread."""

    def __init__(self, host: str, port: int, requests: Iterator[bytes], clients: int) -> None:
        self.result = Result()
        self._address = (host, port)
        self._requests = requests
        self._poll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._free: list[Connection] = []
        for _ in range(clients):
            self._open()

    def run_closed(self, seconds: float) -> Result:
        """Have every client ask as fast as it is answered."""
        began = time.perf_counter()
        ends_at = began + seconds
        while (now := time.perf_counter()) < ends_at:
            while self._free:
                self._ask(self._free.pop(), now)
            self._take(ends_at - now)
        self._finish(began)
        return self.result

    def run_open(self, per_second: float, seconds: float) -> Result:
        """Ask at a fixed pace, whether or not the server keeps up; an answer's latency counts from when its request was due."""
        total, asked = int(per_second * seconds), 0
        waiting: deque[float] = deque()
        began = time.perf_counter()
        while asked < total or waiting:
            now = time.perf_counter()
            while asked < total and began + asked / per_second <= now:
                if not self._free:
                    self.result.late += 1
                waiting.append(began + asked / per_second)
                asked += 1
            while waiting and self._free:
                self._ask(self._free.pop(), waiting.popleft())
            pause_s = began + asked / per_second - time.perf_counter() if asked < total else 1.0
            self._take(max(pause_s, 0.0))
            if not self._connections:
                self.result.broken += len(waiting) + total - asked
                break
            if now - began > seconds + ANSWER_TIMEOUT_S:
                self.result.broken += len(waiting)
                break
        self._finish(began)
        return self.result

    def _ask(self, connection: Connection, due_s: float) -> None:
        connection.due_s, connection.buffer, connection.is_busy, connection.wanted = due_s, b"", True, 0
        connection.sent_s = time.perf_counter()
        try:
            connection.socket.send(next(self._requests))
        except OSError:
            self._lose(connection)

    def _take(self, timeout_s: float) -> None:
        """Read what has come, for at most so long."""
        for number, _ in self._poll.poll(min(timeout_s, 1.0), 512):
            connection = self._connections.get(number)
            if connection is None:
                continue
            try:
                data = connection.socket.recv(READ_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                self._lose(connection)
            elif self._read(connection, data):
                connection.is_busy = False
                self._free.append(connection)

    def _read(self, connection: Connection, data: bytes) -> bool:
        """Take a piece of an answer. True when it is whole."""
        buffer = connection.buffer = connection.buffer + data if connection.buffer else data
        if not connection.wanted:
            end = buffer.find(HEAD_END)
            if end < 0:
                return False
            length = buffer.find(LENGTH, 0, end)
            size = int(buffer[length + len(LENGTH) : buffer.find(b"\r", length + 2)]) if length >= 0 else 0
            connection.wanted = end + len(HEAD_END) + size
        if len(buffer) < connection.wanted or not connection.is_busy:
            return False
        status = int(buffer[9:12])
        now = time.perf_counter()
        self.result.latencies_s.setdefault(status, array("d")).append(now - connection.due_s)
        self.result.waits_s.setdefault(status, array("d")).append(now - connection.sent_s)
        level = buffer.find(LEVEL, 0, connection.wanted)
        if level >= 0:
            self.result.levels[buffer[level + len(LEVEL) : buffer.find(b"\r", level + 2)].strip().decode()] += 1
        return True

    def _open(self) -> None:
        connection = Connection(self._address)
        self._connections[connection.socket.fileno()] = connection
        self._poll.register(connection.socket, select.EPOLLIN)
        self._free.append(connection)

    def _lose(self, connection: Connection) -> None:
        """Note that a connection ended, and open another one in its place."""
        del self._connections[connection.socket.fileno()]
        connection.socket.close()
        if connection.is_busy:
            self.result.broken += 1
        else:
            self._free.remove(connection)
        try:
            self._open()
        except OSError:
            return

    def _finish(self, began: float) -> None:
        """Wait for what is under way, and hang up."""
        asked_until = time.perf_counter()
        while any(connection.is_busy for connection in self._connections.values()):
            self._take(0.1)
            if time.perf_counter() - asked_until > ANSWER_TIMEOUT_S:
                self.result.broken += sum(connection.is_busy for connection in self._connections.values())
                break
        self.result.elapsed_s = time.perf_counter() - began
        for connection in self._connections.values():
            connection.socket.close()
        self._poll.close()


def run_closed(host: str, port: int, requests: Iterator[bytes], *, clients: int, seconds: float) -> Result:
    """Have so many clients ask as fast as they are answered."""
    return Generator(host, port, requests, clients).run_closed(seconds)


def run_open(
    host: str, port: int, requests: Iterator[bytes], *, per_second: float, seconds: float, clients: int
) -> Result:
    """Ask at a fixed pace, whether or not the server keeps up; an answer's latency counts from when its request was due."""
    return Generator(host, port, requests, clients).run_open(per_second, seconds)


def make_request(host: str, path: str, key: str, body: bytes) -> bytes:
    """Return a whole POST request."""
    head = [
        f"POST {path} HTTP/1.1",
        f"host: {host}",
        f"authorization: Bearer {key}",
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    return "\r\n".join(head).encode() + HEAD_END + body
