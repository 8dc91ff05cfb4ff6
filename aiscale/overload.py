"""Know when this process has begun more requests than it can finish soon, so that it can say no to more before they cost anything.

An event loop takes all that comes, and everybody waits for everybody: at ten times the load that it holds, all answers take seconds. So a
request has a place from its first step until it is answered, or until it waits for somebody else (a worker, an upstream). The places are
as many as can be finished within `AISCALE_BUSY_MS` at the pace that this process was seen to keep: no figure to tune for a machine. A
short burst gets more of them than a crowd that stays. From the first refusal on there are only as many as keep the process at work: more
would answer nobody sooner. Those that have a place are worked on a few at a time, the others stand in line: the loop's turns stay short, so
that a refusal waits for some milliseconds, also while a flood begins. See ``aiscale/decisions/0052-say-no-early.md``.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar

from django.conf import settings

TURNS = 16
"""So many requests are worked on at once; each of an event loop's turns is as long as what they do in it."""
TURN_S = 0.05
"""Who is not done after so long waits for somebody, and lets the next one in line have the turn."""
EPOCH_S = 0.5
"""How long the pace is measured."""
KEPT_EPOCHS = 20
"""For so many epochs a request counts at the most: what takes longer waits for somebody, whom nobody foresaw."""
BURST = 256
"""Places of a process that was not crowded all through the last epoch."""
FLOOR = 64
"""Fewer requests than these are no crowd, and get their places whatever the pace."""
SHEDDING_SHARE, SHEDDING_FLOOR = 1 / 15, 8
"""What part of the places there is while requests are refused, and how many at the least."""
FEW_REFUSED, MUCH_IDLE = 0.1, 0.25
"""An epoch that refused a smaller part of its requests, or had nothing to do for more of its time, lets more in: the crowd is going."""


class Epoch:
    """Count the unfinished requests that began in a stretch of time."""

    __slots__ = ("is_counted", "unfinished")

    def __init__(self) -> None:
        self.unfinished, self.is_counted = 0, True


class Place:
    """Be the place of one request."""

    __slots__ = ("_crowd", "_epoch", "has_turn", "turn")

    def __init__(self, crowd: "Crowd", epoch: Epoch) -> None:
        self._crowd, self._epoch = crowd, epoch
        self.has_turn = False
        """Whether it is one of the few that are worked on, and counted as such."""
        self.turn: asyncio.Future[None] | None = None
        """What it waits for in the line."""

    @property
    def has_left(self) -> bool:
        return self._epoch is _LEFT

    async def wait_turn(self) -> None:
        """Return when it may be worked on."""
        if not self.has_turn:
            loop = asyncio.get_running_loop()
            self.turn = loop.create_future()
            self._crowd.watch(loop)
            await self.turn

    def leave(self) -> None:
        """Make room. Idempotent."""
        epoch, self._epoch = self._epoch, _LEFT
        if epoch is not _LEFT:
            self._crowd.leave(epoch, self)


_LEFT = Epoch()


class Crowd:
    """Count those that are worked on, and tell who is one too many."""

    def __init__(self, within_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``within_s``: how soon what is taken should be finished; 0: take everything."""
        self._within_s, self._clock = within_s, clock
        self._epochs = deque([Epoch()])
        self._began = clock()
        self._finished = self._fewest = self._begun = self._refused = 0
        self._idle_since, self._idle_s = self._began, 0.0
        self._working = 0
        self._turns: deque[tuple[float, Place]] = deque()
        self._line: deque[Place] = deque()
        self._is_watched = False
        self.refused_outside, self._outside_seen = 0, 0
        """How many the server's own thread has refused, which alone counts them, and how many of those were looked at."""
        self.is_shedding = False
        """Whether requests are refused until the crowd is gone."""
        self.count = 0
        """How many are worked on."""
        self.places = BURST

    def enter(self) -> Place | None:
        """Take a place; None when there is none. I/O: none."""
        now_s = self._clock()
        if now_s - self._began >= EPOCH_S:
            self._turn(now_s)
        if self.count >= self.places and self._within_s:
            if not self.is_shedding:
                self._begin_shedding(now_s - self._began)
            self._refused += 1
            return None
        self._begun += 1
        if not self.count:
            self._idle_s += now_s - self._idle_since
        epoch = self._epochs[-1]
        epoch.unfinished += 1
        self.count += 1
        place = Place(self, epoch)
        self._take_back(now_s)
        if self._working < TURNS or not self._within_s:
            self._give_turn(place, now_s)
        else:
            self._line.append(place)
        return place

    def is_full(self, underway: int) -> bool:
        """Tell any thread whether a request would be refused now. I/O: none; reads only.

        ``underway``: how many others are on their way to `enter`. When an epoch is over one is let in, for the loop to begin the next.
        """
        if not self.is_shedding or self.count + underway < self.places:
            return False
        return underway > 0 or self._clock() - self._began < EPOCH_S

    def leave(self, epoch: Epoch, place: Place) -> None:
        """Note that a request of this epoch left its place."""
        if place.has_turn:
            place.has_turn = False
            self._working -= 1
            if self._line:
                self._call_next()
        epoch.unfinished -= 1
        if epoch.is_counted:
            self.count -= 1
            if not self.count:
                self._idle_since = self._clock()
        self._finished += 1
        self._fewest = min(self._fewest, self.count)

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """See to it that the line moves on though nobody comes or leaves. I/O: none."""
        if not self._is_watched:
            self._is_watched = True
            loop.call_later(TURN_S, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_watched = False
        self._take_back(self._clock())
        self._call_next()
        if self._line:
            self.watch(loop)

    def _take_back(self, now_s: float) -> None:
        """Take the turn from those who had it for long: what they wait for is not this process."""
        turns = self._turns
        while turns and (not turns[0][1].has_turn or now_s - turns[0][0] > TURN_S):
            place = turns.popleft()[1]
            if place.has_turn:
                place.has_turn = False
                self._working -= 1

    def _call_next(self) -> None:
        """Give free turns to those who wait longest; who left the line is passed over."""
        while self._line and self._working < TURNS:
            place = self._line.popleft()
            if not place.has_left:
                self._give_turn(place, self._clock())

    def _give_turn(self, place: Place, now_s: float) -> None:
        place.has_turn = True
        self._working += 1
        self._turns.append((now_s, place))
        if place.turn is not None and not place.turn.done():
            place.turn.set_result(None)

    def _begin_shedding(self, elapsed_s: float) -> None:
        """Leave few places, now and not at the epoch's end."""
        self.is_shedding = True
        self.places = self._count_few(max(elapsed_s, EPOCH_S / 10))

    def _count_few(self, elapsed_s: float) -> int:
        return max(SHEDDING_FLOOR, int(self._finished / elapsed_s * self._within_s * SHEDDING_SHARE))

    def _turn(self, now_s: float) -> None:
        """Begin an epoch: count anew, and learn how many places there are from the one that ends."""
        elapsed_s = now_s - self._began
        if not self.count:
            self._idle_s += now_s - self._idle_since
        outside = self.refused_outside
        self._refused += outside - self._outside_seen
        self._outside_seen = outside
        few = self._refused < FEW_REFUSED * (self._refused + self._begun)
        if self.is_shedding and not few and self._idle_s < MUCH_IDLE * elapsed_s:
            self.places = self._count_few(elapsed_s)
        elif self.is_shedding and self._refused and self.places < BURST:
            self.places *= 2
        else:
            self.is_shedding = False
            is_crowded = self._fewest >= FLOOR
            self.places = max(FLOOR, int(self._finished / elapsed_s * self._within_s)) if is_crowded else BURST
        self._epochs.append(Epoch())
        if len(self._epochs) > KEPT_EPOCHS:
            oldest = self._epochs.popleft()
            oldest.is_counted = False
            self.count -= oldest.unfinished
        self._began, self._finished, self._fewest = now_s, 0, self.count
        self._begun = self._refused = 0
        self._idle_since, self._idle_s = now_s, 0.0


_crowd: Crowd | None = None
_place: ContextVar[Place | None] = ContextVar("place", default=None)


def get_crowd() -> Crowd:
    """Return this process's crowd."""
    global _crowd
    if _crowd is None:
        _crowd = Crowd(settings.ENV.busy_ms / 1000)
    return _crowd


def enter() -> Place | None:
    """Take a place for the running task's request; None when there is none, and it is to be refused. I/O: none."""
    place = get_crowd().enter()
    if place is not None:
        _place.set(place)
    return place


def wait_elsewhere() -> None:
    """Give the running task's place back, where it has one: from here on it waits for a worker or an upstream. I/O: none."""
    place = _place.get()
    if place is not None:
        place.leave()
