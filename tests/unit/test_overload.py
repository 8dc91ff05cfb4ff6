"""A process takes as many requests as it can finish soon, at the pace it was seen to keep, and says no to the rest (D1)."""

import asyncio

import pytest

from aiscale import overload
from aiscale.overload import BURST, EPOCH_S, KEPT_EPOCHS, SHEDDING_FLOOR, TURNS, Crowd, Place


class Server:
    """Finish requests one after the other at a fixed pace, on a clock of its own."""

    def __init__(self, per_second: float, within_s: float = 0.15) -> None:
        self.now_s = 0.0
        self.crowd = Crowd(within_s, lambda: self.now_s)
        self.begun: list[tuple[float, Place]] = []
        self.waits_s: list[float] = []
        self.refused = self.asked = 0
        self._step_s = 1 / per_second

    def run(self, seconds: float, arrivals_per_second: float, together: int = 1) -> None:
        ends_at, due_s = self.now_s + seconds, self.now_s
        while self.now_s < ends_at:
            while due_s <= self.now_s:
                self.asked += 1
                due_s += together / arrivals_per_second if self.asked % together == 0 else 0
                place = self.crowd.enter()
                if place is None:
                    self.refused += 1
                else:
                    self.begun.append((self.now_s, place))
            if self.begun:
                began_s, place = self.begun.pop(0)
                place.leave()
                self.waits_s.append(self.now_s - began_s)
            self.now_s += self._step_s


def test_ten_times_the_load_leaves_answers_fast_and_refuses_the_rest() -> None:
    server = Server(per_second=1_000)
    server.run(2, 900)
    assert server.refused == 0 and max(server.waits_s) < 0.01
    server.waits_s.clear()
    server.run(10, 10_000)
    assert server.refused > 85_000
    assert len(server.waits_s) > 9_500, "what can be answered is answered"
    settled = server.waits_s[1_500:]
    assert max(settled) < 0.02, "and soon"
    server.run(2, 900)
    refused = server.refused
    server.run(2, 900)
    assert server.refused == refused, "once the crowd is gone nobody is refused"


def test_a_slow_machine_has_fewer_places_and_a_fast_one_more() -> None:
    places = []
    for pace in (100, 1_000, 4_000):
        server = Server(per_second=pace)
        server.run(5, 10 * pace)
        places.append(server.crowd.places)
    assert places[0] == SHEDDING_FLOOR and 8 <= places[1] <= 11 and 36 <= places[2] <= 42


def test_many_who_ask_again_as_soon_as_they_are_answered_are_served() -> None:
    server = Server(per_second=3_000)
    for _ in range(240):
        place = server.crowd.enter()
        assert place is not None
        server.begun.append((server.now_s, place))
    server.run(5, 2_999)
    assert server.refused == 0, "240 at 3,000 a second wait for 80 ms"


def test_a_load_that_can_be_borne_is_borne_again_after_a_crowd() -> None:
    server = Server(per_second=1_000)
    server.run(3, 10_000)
    assert server.crowd.is_shedding
    # in handfuls, that are more than there were places in the crowd
    server.run(4, 900, together=30)
    refused = server.refused
    server.run(10, 900, together=30)
    assert server.refused == refused and not server.crowd.is_shedding


def test_a_burst_after_a_pause_finds_room() -> None:
    server = Server(per_second=1_000)
    server.run(2, 500)
    places = [server.crowd.enter() for _ in range(200)]
    assert None not in places


def test_who_waits_for_a_worker_is_no_crowd() -> None:
    now_s = [0.0]
    crowd = Crowd(0.15, lambda: now_s[0])
    for _ in range(40 * BURST):
        now_s[0] += 0.001
        place = crowd.enter()
        assert place is not None
        # it is queued, and goes on for minutes
        place.leave()
    assert crowd.count == 0
    place = crowd.enter()
    assert place is not None
    place.leave()
    place.leave()
    assert crowd.count == 0, "leaving twice counts once"


def test_what_never_ends_takes_no_place_for_long() -> None:
    now_s = [0.0]
    crowd = Crowd(0.15, lambda: now_s[0])
    hung = [crowd.enter() for _ in range(BURST)]
    assert None not in hung and crowd.enter() is None
    for _ in range(KEPT_EPOCHS - 1):
        now_s[0] += EPOCH_S
        assert crowd.enter() is None
    now_s[0] += EPOCH_S
    assert crowd.enter() is not None and crowd.count == 1
    for place in hung:
        assert place is not None
        place.leave()
    assert crowd.count == 1, "those who leave late make no room twice"


def test_without_a_bound_everything_is_taken() -> None:
    crowd = Crowd(0.0)
    assert all(crowd.enter() is not None for _ in range(10 * BURST))


async def _stand_in_line(crowd: Crowd, count: int) -> tuple[list[Place], list[asyncio.Task[None]]]:
    """Have so many come at once, each of which waits for its turn."""
    places = [place for _ in range(count) if (place := crowd.enter()) is not None]
    waits = [asyncio.ensure_future(place.wait_turn()) for place in places]
    await asyncio.sleep(0)
    return places, waits


async def test_a_few_are_worked_on_at_once_and_the_others_follow_in_the_order_they_came() -> None:
    crowd = Crowd(0.15)
    places, waits = await _stand_in_line(crowd, 3 * TURNS)
    assert [wait.done() for wait in waits] == [True] * TURNS + [False] * 2 * TURNS
    # one is done, one of those in line gives up, and one begins to wait for a worker
    places[3].leave()
    waits[TURNS + 1].cancel()
    places[TURNS + 1].leave()
    places[0].leave()
    await asyncio.sleep(0)
    assert places[TURNS].has_turn and places[TURNS + 2].has_turn and not places[TURNS + 3].has_turn
    assert sum(place.has_turn for place in places) == TURNS
    for place in places:
        place.leave()
    await asyncio.sleep(0)
    assert crowd.count == 0 and all(wait.done() for wait in waits)
    late = crowd.enter()
    assert late is not None and late.has_turn, "the line is empty"


async def test_those_who_hang_do_not_hold_up_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "TURN_S", 0.01)
    crowd = Crowd(0.15)
    places, waits = await _stand_in_line(crowd, 2 * TURNS)
    # nobody comes and nobody leaves: those at work wait for a database that does not answer
    await asyncio.wait_for(asyncio.gather(*waits), timeout=30)
    for place in places:
        place.leave()
    assert crowd.count == 0
    _, waits = await _stand_in_line(crowd, TURNS + 1)
    assert [wait.done() for wait in waits] == [True] * TURNS + [False], "who left late gave no turn back twice"


def test_hanging_requests_are_forgotten() -> None:
    now_s = [0.0]
    crowd = Crowd(0.15, lambda: now_s[0])
    hung = crowd.enter()
    for _ in range(1_000):
        now_s[0] += overload.TURN_S
        place = crowd.enter()
        assert place is not None and place.has_turn
        place.leave()
    assert hung is not None and not hung.has_turn
    assert len(crowd._turns) <= 2 and not crowd._line
