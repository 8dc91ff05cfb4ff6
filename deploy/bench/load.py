"""Ask an HTTP server many times over kept-alive connections, cheaply: a load generator for the benchmarks on the same machine.

A request is bytes that were made beforehand, so that one costs this process a few microseconds and not the server's share of the cores.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

HEAD_END = b"\r\n\r\n"


@dataclass
class Result:
    """Hold what was seen: latencies in seconds, statuses, and the cache's levels."""

    latencies_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    levels: Counter[str] = field(default_factory=Counter)
    late: int = 0
    """Requests of an open load that found no free connection when they were due: they were sent later, and their wait counts."""
    broken: int = 0
    elapsed_s: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.statuses.values())

    def percentile_ms(self, percent: float) -> float:
        ordered = sorted(self.latencies_s)
        return 1000 * ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)] if ordered else 0.0


class Connection(asyncio.Protocol):
    """Send one request after the other, and read each answer to its end."""

    def __init__(self, result: Result) -> None:
        self._result = result
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._due_s = 0.0
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self, request: bytes, due_s: float) -> asyncio.Future[None]:
        """Send; the future is done with the answer. Latency counts from ``due_s``."""
        assert self._transport is not None
        self._due_s, self._buffer = due_s, b""
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        end = self._buffer.find(HEAD_END)
        if end < 0:
            return
        head = self._buffer[:end].lower()
        length = head.find(b"content-length:")
        size = int(head[length + 15 :].split(b"\r\n", 1)[0]) if length >= 0 else 0
        if len(self._buffer) < end + 4 + size or self._done is None or self._done.done():
            return
        self._result.latencies_s.append(time.perf_counter() - self._due_s)
        self._result.statuses[int(head[9:12])] += 1
        level = head.find(b"x-aiscale-cache:")
        if level >= 0:
            self._result.levels[head[level + 16 :].split(b"\r\n", 1)[0].strip().decode()] += 1
        self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._result.broken += 1
            self._done.set_result(None)


async def run_closed(host: str, port: int, requests: Iterator[bytes], *, clients: int, seconds: float) -> Result:
    """Have so many clients ask as fast as they are answered."""
    result = Result()
    began = time.perf_counter()

    async def work() -> None:
        connection = await _connect(host, port, result)
        while time.perf_counter() - began < seconds:
            await connection.ask(next(requests), time.perf_counter())

    await asyncio.gather(*(work() for _ in range(clients)))
    result.elapsed_s = time.perf_counter() - began
    return result


async def run_open(
    host: str, port: int, requests: Iterator[bytes], *, per_second: float, seconds: float, clients: int
) -> Result:
    """Ask at a fixed pace, whether or not the server keeps up; an answer's latency counts from when its request was due."""
    result = Result()
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for connection in await asyncio.gather(*(_connect(host, port, result) for _ in range(clients))):
        free.put_nowait(connection)
    began = time.perf_counter()
    running: set[asyncio.Future[None]] = set()
    for number in range(int(per_second * seconds)):
        due_s = began + number / per_second
        pause_s = due_s - time.perf_counter()
        if pause_s > 0.001:
            await asyncio.sleep(pause_s)
        elif number % 20 == 0:
            await asyncio.sleep(0)
        if free.empty():
            result.late += 1
        connection = await free.get()
        done = connection.ask(next(requests), due_s)
        running.add(done)
        done.add_done_callback(_give_back(free, connection, running))
    while running:
        await asyncio.wait(set(running))
    result.elapsed_s = time.perf_counter() - began
    return result


def _give_back(
    free: asyncio.Queue[Connection], connection: Connection, running: set[asyncio.Future[None]]
) -> Callable[[asyncio.Future[None]], None]:
    def give_back(done: asyncio.Future[None]) -> None:
        running.discard(done)
        free.put_nowait(connection)

    return give_back


async def _connect(host: str, port: int, result: Result) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(lambda: Connection(result), host, port)
    return connection


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
