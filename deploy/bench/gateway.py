"""Measure the gateway on this machine, load generator included. Every request is authenticated, limited, budgeted, metered, and in the
ledger afterwards: a run is called bad when one is not, when an answer failed, or when the pace was not kept.

Usage: PYTHONPATH=. .venv/bin/python deploy/bench/gateway.py [--part known|mixed|overload|streams|memory|litellm ...] [--seconds 10]

Each part brings up the whole product in a temporary directory (`manage.py up`) with the real encoders. Without ``--part`` all run.

- known: few texts, asked by many keys of three plans as fast as they are answered, by wrk where it is there.
- mixed: embeddings and classifications of texts by Zipf's law; what is not known goes through Celery and the real model. An open load:
  it comes at a fixed pace, and latency counts from when a request was due.
- overload: the mixed load, then ten times of it. What is refused must be refused fast, and what is taken be answered as before.
- streams: 500 chats over WebSockets at once, from the fake runner; how late each token is at the client.
- memory: the mixed load as fast as it goes, for long; whether the processes grow.
- litellm: known, in turn with LiteLLM's proxy with a mocked upstream and two workers.
"""

import argparse
import random
from collections.abc import Callable, Iterator

from deploy.bench import litellm_proxy, streams
from deploy.bench.ledger import Books
from deploy.bench.load import Result, run_closed, run_open
from deploy.bench.orders import iter_mixed, list_known, write
from deploy.bench.stack import HOST, Stack, running, show_cpu
from deploy.bench.wrk import WrkResult, find_wrk, run_wrk

CONNECTIONS = 256
OVERLOAD_CONNECTIONS = 1024
OVERLOAD_QUEUED = 3
"""What the three plans of the overload let wait for each model: together some tenths of a second."""
KNOWN_GOAL_PER_SECOND, KNOWN_GOAL_P99_MS = 3_000, 50
MIXED_GOAL_P99_MS, MIXED_GOAL_HITS = 500, 80
REFUSAL_GOAL_P99_MS = 50
REFUSED = (503, 429)
MEMORY_CACHE_BYTES = 8 << 20
"""So small that the memory part fills it, and throws out, early."""
MEMORY_LOOKS = 12
GROWTH_MB, GROWTH_PERCENT = 8.0, 5.0
"""A process that holds more than so much more at the end of the second half than at its beginning is said to grow."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the gateway.")
    parser.add_argument("--part", action="append", choices=sorted(PARTS), help="what to measure; by default all")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each measurement takes")
    parser.add_argument("--rate", type=float, default=1000.0, help="requests a second of the mixed load")
    parser.add_argument("--clients", type=int, default=48, help="clients of the known load")
    parser.add_argument("--memory-seconds", type=float, default=45.0, help="how long memory is watched")
    parser.add_argument("--memory-rate", type=float, default=0.0, help="its requests a second; 0: as fast as they go")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument(
        "--step-ms", type=int, default=200, help="how long the fake runner takes for a token of each stream"
    )
    parser.add_argument("--times", type=float, default=10.0, help="how many times the mixed load the overload is")
    options = parser.parse_args()
    good = {name: PARTS[name](options) for name in options.part or PARTS}
    bad = [name for name, is_good in good.items() if not is_good]
    print(f"\nNOT GOOD: {', '.join(bad)}" if bad else "\nall runs were good")
    raise SystemExit(1 if bad else 0)


def measure_known(options: argparse.Namespace) -> bool:
    """Ask for known answers as fast as they go."""
    with running() as stack:
        keys, books, wrk = stack.make_keys(), Books(stack), find_wrk()
        warm_known(stack, keys, books)
        if wrk is None:
            print("\nwrk is not there, and cannot be installed: our own generator asks, which costs more CPU")
            ask_known(stack, keys, books, options)
        else:
            wrk_known(stack, wrk, keys, books, options)
        return books.close()


def warm_known(stack: Stack, keys: list[str], books: Books) -> None:
    requests = write(list_known(keys, make_chance()) * 3)
    warm = run_open(HOST, stack.port, requests, per_second=400, seconds=4, clients=CONNECTIONS)
    books.add(warm.answered, failed=warm.failed)


def wrk_known(stack: Stack, wrk: str, keys: list[str], books: Books, options: argparse.Namespace) -> WrkResult:
    before = stack.cpu_times_s()
    url = f"http://{HOST}:{stack.port}"
    result = run_wrk(wrk, url, list_known(keys, make_chance()), clients=options.clients, seconds=options.seconds)
    after = stack.cpu_times_s()
    # what was under way as wrk hung up may be in the ledger, or not
    books.add(result.answered, failed=result.failed, cut_off=options.clients)
    print(f"\nknown answers, as fast as {options.clients} connections of wrk ask")
    show_latency(result.per_second, result.percentiles_ms)
    show_levels(dict(result.levels), result.answered)
    print(f"  errors {dict(result.errors)}")
    show_cpu(before, after, result.elapsed_s, result.answered)
    show_goal(
        f"{KNOWN_GOAL_PER_SECOND} requests/s with a p99 under {KNOWN_GOAL_P99_MS} ms",
        result.per_second >= KNOWN_GOAL_PER_SECOND and result.percentiles_ms[99] < KNOWN_GOAL_P99_MS,
    )
    return result


def ask_known(stack: Stack, keys: list[str], books: Books, options: argparse.Namespace) -> None:
    before = stack.cpu_times_s()
    requests = write(list_known(keys, make_chance()) * 200)
    result = run_closed(HOST, stack.port, requests, clients=options.clients, seconds=options.seconds)
    show("known answers, as fast as they go", result, before, stack.cpu_times_s())
    books.add(result.answered, failed=result.failed)
    show_goal(
        f"{KNOWN_GOAL_PER_SECOND} requests/s with a p99 under {KNOWN_GOAL_P99_MS} ms",
        result.answered / result.elapsed_s >= KNOWN_GOAL_PER_SECOND and result.percentile_ms(99) < KNOWN_GOAL_P99_MS,
    )


def measure_mixed(options: argparse.Namespace) -> bool:
    """Ask for known and new answers at a fixed pace."""
    with running() as stack:
        books, requests = Books(stack), write(iter_mixed(stack.make_keys(), make_chance()))
        ask_mixed(stack, books, requests, options)
        return books.close()


def ask_mixed(
    stack: Stack, books: Books, requests: Iterator[bytes], options: argparse.Namespace, *, may_refuse: bool = False
) -> Result:
    warm = run_open(HOST, stack.port, requests, per_second=options.rate / 4, seconds=8, clients=CONNECTIONS)
    books.add(warm.answered, failed=warm.failed - may_refuse * count_refused(warm))
    before = stack.cpu_times_s()
    result = run_open(HOST, stack.port, requests, per_second=options.rate, seconds=options.seconds, clients=CONNECTIONS)
    show(f"mixed, {options.rate:.0f} a second", result, before, stack.cpu_times_s())
    books.add(result.answered, failed=result.failed - may_refuse * count_refused(result))
    books.check_pace(result.elapsed_s, options.seconds)
    hits = count_hits(result)
    show_goal(
        f"p99 under {MIXED_GOAL_P99_MS} ms with {MIXED_GOAL_HITS} % hits",
        result.percentile_ms(99) < MIXED_GOAL_P99_MS and hits >= MIXED_GOAL_HITS * result.answered / 100,
    )
    return result


def measure_overload(options: argparse.Namespace) -> bool:
    """Ask for ten times as much as what the mixed load is."""
    with running() as stack:
        books, requests = Books(stack), write(iter_mixed(stack.make_keys(), make_chance()))
        stack.hurry(OVERLOAD_QUEUED)
        usual = ask_mixed(stack, books, requests, options, may_refuse=True)
        rate, before = options.rate * options.times, stack.cpu_times_s()
        result = run_open(
            HOST, stack.port, requests, per_second=rate, seconds=options.seconds, clients=OVERLOAD_CONNECTIONS
        )
        show(f"{options.times:g} times as much, {rate:.0f} a second", result, before, stack.cpu_times_s())
        refused = count_refused(result)
        print(f"  refused {refused} ({100 * refused / max(result.count, 1):.0f} %)")
        for name, statuses in (("refusals", REFUSED), ("answers", (200,))):
            for how, from_sent in (("due", False), ("sent", True)):
                values = {each: result.percentile_ms(each, statuses, from_sent=from_sent) for each in (50, 90, 99)}
                print(f"  {name} after they were {how}: " + "   ".join(f"p{q} {ms:.0f} ms" for q, ms in values.items()))
        books.add(result.answered, failed=result.failed - refused)
        show_goal(
            f"refusals with a p99 under {REFUSAL_GOAL_P99_MS} ms",
            result.percentile_ms(99, REFUSED) < REFUSAL_GOAL_P99_MS,
        )
        print(
            f"  answers: p99 {result.percentile_ms(99):.1f} ms, {usual.percentile_ms(99):.1f} ms under the usual load"
        )
        show_goal(f"answers with a p99 under {MIXED_GOAL_P99_MS} ms", result.percentile_ms(99) < MIXED_GOAL_P99_MS)
        return books.close()


def measure_memory(options: argparse.Namespace) -> bool:
    """Ask for long, and look at the processes' memory now and then."""
    with running({"AISCALE_CACHE_BYTES": str(MEMORY_CACHE_BYTES)}) as stack:
        books, requests = Books(stack), write(iter_mixed(stack.make_keys(), make_chance()))
        looks, asked = [stack.memory_mb()], [0]
        for _ in range(MEMORY_LOOKS):
            seconds = options.memory_seconds / MEMORY_LOOKS
            if options.memory_rate:
                part = run_open(
                    HOST, stack.port, requests, per_second=options.memory_rate, seconds=seconds, clients=CONNECTIONS
                )
            else:
                part = run_closed(HOST, stack.port, requests, clients=options.clients, seconds=seconds)
            books.add(part.answered, failed=part.failed)
            looks.append(stack.memory_mb())
            asked.append(asked[-1] + part.count)
        print(f"\nmemory, MB, over {asked[-1]} requests (the web's own cache holds {MEMORY_CACHE_BYTES >> 20} MB)")
        is_flat = show_memory(looks, asked)
        return books.close() and is_flat


def show_memory(looks: list[dict[str, float]], asked: list[int]) -> bool:
    """Print each process's memory, and tell whether none grows. Postgres and Valkey keep what they are told to keep: they are shown."""
    middle, is_flat = len(looks) // 2, True
    for name in looks[0]:
        first, last = looks[middle][name], looks[-1][name]
        slope_mb = (last - first) / max(asked[-1] - asked[middle], 1) * 1e6
        grows = last - first > max(GROWTH_MB, first * GROWTH_PERCENT / 100) and name not in ("postgres", "valkey")
        is_flat = is_flat and not grows
        values = " ".join(f"{look[name]:.0f}" for look in looks)
        print(f"  {name:10} {values}   second half: {slope_mb:+.0f} MB a million requests{'   GROWS' if grows else ''}")
    return is_flat


def measure_litellm(options: argparse.Namespace) -> bool:
    """Ask us and LiteLLM's proxy for the same, in turn."""
    wrk = find_wrk()
    if wrk is None:
        print("\nwrk is not there, and cannot be installed: nothing to compare with")
        return False
    with running() as stack, litellm_proxy.running() as rival:
        keys, books = stack.make_keys(), Books(stack)
        warm_known(stack, keys, books)
        litellm_proxy.warm(rival, wrk, list_known(keys, make_chance()), options)
        ours, theirs = [], []
        for _ in range(2):
            ours.append(wrk_known(stack, wrk, keys, books, options))
            theirs.append(litellm_proxy.ask(rival, wrk, list_known(keys, make_chance()), options))
            show_latency(theirs[-1].per_second, theirs[-1].percentiles_ms)
            print(f"  errors {dict(theirs[-1].errors)}")
        ratio = sum(each.per_second for each in ours) / max(sum(each.per_second for each in theirs), 1e-9)
        print(f"\naiscale answers {ratio:.1f} times as many requests a second as LiteLLM's proxy")
        return books.close() and not any(each.failed for each in theirs)


def make_chance() -> random.Random:
    return random.Random(7)  # noqa: S311 - a load, no secret


def count_refused(result: Result) -> int:
    return sum(result.statuses.get(status, 0) for status in REFUSED)


def count_hits(result: Result) -> int:
    return sum(count for level, count in result.levels.items() if level != "miss")


def show(title: str, result: Result, before: dict[str, float], after: dict[str, float]) -> None:
    print(f"\n{title}")
    show_latency(result.count / result.elapsed_s, {percent: result.percentile_ms(percent) for percent in (50, 95, 99)})
    show_levels(dict(result.levels), result.answered)
    print(f"  statuses {result.statuses}   broken {result.broken}   late {result.late}")
    show_cpu(before, after, result.elapsed_s, result.count)


def show_latency(per_second: float, percentiles_ms: dict[int, float]) -> None:
    values = "   ".join(f"p{percent} {value:.1f} ms" for percent, value in percentiles_ms.items())
    print(f"  {per_second:8.0f} requests/s   {values}")


def show_levels(levels: dict[str, int], answered: int) -> None:
    hits = sum(count for level, count in levels.items() if level not in ("miss", "none"))
    print(f"  hits {100 * hits / max(answered, 1):.1f} %   by level: {levels}")


def show_goal(what: str, is_met: bool) -> None:
    print(f"  goal: {what}: {'met' if is_met else 'MISSED'}")


PARTS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "known": measure_known,
    "mixed": measure_mixed,
    "overload": measure_overload,
    "streams": streams.measure,
    "memory": measure_memory,
    "litellm": measure_litellm,
}


if __name__ == "__main__":
    main()
