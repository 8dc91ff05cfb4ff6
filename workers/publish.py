"""Say what came out: one Redis pipeline at a time, with everything that the engines made since the last one.

Events wait here, in order, while Redis is away; a job's `Finished` goes through finish.lua, which writes it once.
"""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from redis.exceptions import NoScriptError, RedisError

from aiscale.wire import codec, keys
from aiscale.wire.events import Delta, Encoded, Event, Finished, FinishReason, Started, TokenLogprob
from aiscale.wire.jobs import EncodeJob, GenerateJob
from aiscale.wire.scripts import digest_script, finish_arguments, read_script
from workers.config import WORKER_ID, get_redis
from workers.recent_ends import RecentEnds

log = logging.getLogger(__name__)

INLINE_VECTORS_BYTES = 1 << 20
"""Vectors larger than this travel by reference (S4)."""
RESULT_TTL_S = 120
PROLONG_LOG_S = keys.JOB_LOG_TTL_S / 4
"""How often a job's log is given its whole life again: for each token it would be a third of the commands."""
MAX_WAITING = 200_000
"""Events that may wait for a Redis that is away; beyond it deltas are dropped, never ends."""


@dataclass(kw_only=True, eq=False)
class JobInHand:
    """Hold one claimed job and what was said of it."""

    job: GenerateJob | EncodeJob
    attempt: int
    seq: int = 0
    streamed: bool = False
    ended: bool = False
    lost: bool = False
    """Another process has it by now: nothing more is said."""
    text: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    stop_sequence: str | None = None
    first_token_at_ms: int = 0
    claimed_at_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    lease_end_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000 + keys.LEASE_MS)
    """Until when nobody else takes the job, by this worker's clock: the heartbeat pushes it ahead."""
    log_kept_until_s: float = 0.0
    """Until when nobody need prolong its log's life."""
    published: threading.Event = field(default_factory=threading.Event)
    """Set once the end is in Redis, or nothing more will be said."""

    @property
    def keep_log(self) -> bool:
        return isinstance(self.job, GenerateJob) and self.job.keep_log

    def next_seq(self) -> int:
        self.seq += 1
        return self.seq - 1


class Publisher:
    """Write events from a thread of its own. Its methods may be called from any thread; those of one job from one at a time."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[JobInHand, Event]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._idle = True
        self.recent_ends = RecentEnds()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def start_job(self, in_hand: JobInHand) -> None:
        event = Started(job_id=in_hand.job.job_id, seq=in_hand.next_seq(), worker_id=WORKER_ID, attempt=in_hand.attempt)
        self._add(in_hand, event)

    def add_text(
        self,
        in_hand: JobInHand,
        text: str,
        *,
        index: int = 0,
        logprobs: tuple[TokenLogprob, ...] = (),
        end: Literal["stop", "length"] | None = None,
    ) -> None:
        now_ms = time.time_ns() // 1_000_000
        in_hand.first_token_at_ms = in_hand.first_token_at_ms or now_ms
        if in_hand.keep_log and index == 0:
            in_hand.text.append(text)
        event = Delta(
            job_id=in_hand.job.job_id,
            seq=in_hand.next_seq(),
            text=text,
            completion_tokens=in_hand.completion_tokens,
            index=index,
            logprobs=logprobs,
            end=end,
            made_at_ms=now_ms,
        )
        self._add(in_hand, event)

    def add_vectors(self, in_hand: JobInHand, vectors: NDArray[np.float32]) -> None:
        data = np.ascontiguousarray(vectors, "<f4").tobytes()
        inline = len(data) <= INLINE_VECTORS_BYTES
        key = keys.job_result(in_hand.job.job_id)
        if not inline:
            get_redis().set(key, data, ex=RESULT_TTL_S)
        event = Encoded(
            job_id=in_hand.job.job_id,
            seq=in_hand.next_seq(),
            count=vectors.shape[0],
            dimensions=vectors.shape[1],
            vectors=data if inline else None,
            result_key=None if inline else key,
        )
        self._add(in_hand, event)

    def finish(
        self, in_hand: JobInHand, reason: FinishReason, *, error: str | None = None, code: str | None = None
    ) -> None:
        """Say the end of a job. Idempotent."""
        if in_hand.ended:
            return
        in_hand.ended = True
        job, now_ms = in_hand.job, time.time_ns() // 1_000_000
        admitted_at_ms = job.billing.admitted_at_ms
        codes = {
            "killed": "killed",
            "deadline": "deadline_exceeded",
            "cancelled": "cancelled",
            "error": "engine_failed",
        }
        event = Finished(
            job_id=job.job_id,
            seq=in_hand.next_seq(),
            kind="generate" if isinstance(job, GenerateJob) else "encode",
            model=job.model,
            model_version=job.model_version,
            finish_reason=reason,
            prompt_tokens=in_hand.prompt_tokens,
            completion_tokens=in_hand.completion_tokens,
            cached_tokens=in_hand.cached_tokens,
            stop_sequence=in_hand.stop_sequence if reason == "stop" else None,
            billing=job.billing,
            error_code=code or codes.get(reason),
            error_message=error,
            text="".join(in_hand.text) if in_hand.keep_log else None,
            worker_id=WORKER_ID,
            queued_ms=max(in_hand.claimed_at_ms - admitted_at_ms, 0),
            first_token_ms=max(in_hand.first_token_at_ms - admitted_at_ms, 0) if in_hand.first_token_at_ms else None,
            duration_ms=max(now_ms - admitted_at_ms, 0),
            finished_at_ms=now_ms,
        )
        self._add(in_hand, event)

    def drop(self, in_hand: JobInHand) -> None:
        """Say nothing more of a job: the reaper, or another worker, has it."""
        in_hand.ended = in_hand.lost = True
        in_hand.published.set()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is in Redis. False when time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and self._idle, timeout_s)

    def _add(self, in_hand: JobInHand, event: Event) -> None:
        with self._changed:
            if len(self._waiting) >= MAX_WAITING and isinstance(event, Delta):
                return
            self._waiting.append((in_hand, event))
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle = True
                self._changed.notify_all()
                while not self._waiting:
                    self._changed.wait()
                self._idle = False
                batch = list(self._waiting)
                self._waiting.clear()
            self._write_until_done([item for item in batch if not item[0].lost])

    def _write_until_done(self, batch: list[tuple[JobInHand, Event]]) -> None:
        """Write a batch in one transaction, again until Redis takes it; so nothing is written in part."""
        pause_s = 0.05
        while batch:
            try:
                batch = self._keep_own(batch)
                self._write(batch)
                break
            except (RedisError, OSError) as error:
                log.warning("events wait for Redis: %s", error)
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, 1.0)
        for in_hand, event in batch:
            if isinstance(event, Finished):
                in_hand.published.set()

    def _keep_own(self, batch: list[tuple[JobInHand, Event]]) -> list[tuple[JobInHand, Event]]:
        """Drop what is told of jobs whose lease has passed, unless they are this worker's still: it may have been asleep, and another
        worker may be telling the same. I/O: none, as long as the heart beats. Raises: RedisError, OSError."""
        now_ms = time.time_ns() // 1_000_000
        late = list({id(in_hand): in_hand for in_hand, _ in batch if in_hand.lease_end_ms <= now_ms}.values())
        if not late:
            return batch
        pipeline: Any = get_redis().pipeline(transaction=False)
        for in_hand in late:
            pipeline.hmget(keys.job_record(in_hand.job.job_id), "worker", "state", "attempt")
        for in_hand, (worker, state, attempt) in zip(late, pipeline.execute(), strict=True):
            ours = (WORKER_ID.encode(), b"running", str(in_hand.attempt).encode())
            if (worker, state, attempt) != ours:
                self.drop(in_hand)
        return [item for item in batch if not item[0].lost]

    def _write(self, batch: list[tuple[JobInHand, Event]]) -> None:
        pipeline: Any = get_redis().pipeline(transaction=True)
        by_process: dict[str, list[bytes]] = {}
        by_log: dict[JobInHand, list[bytes]] = {}
        ends: list[tuple[JobInHand, Finished]] = []
        for in_hand, event in batch:
            if isinstance(event, Finished):
                ends.append((in_hand, event))
                continue
            data = codec.encode_event(event)
            by_process.setdefault(in_hand.job.reply_to, []).append(data)
            if in_hand.keep_log:
                by_log.setdefault(in_hand, []).append(data)
            if isinstance(event, Delta) and not in_hand.streamed:
                pipeline.hset(keys.job_record(in_hand.job.job_id), "streamed", 1)
        for process_id, events in by_process.items():
            fields: Any = {str(index): data for index, data in enumerate(events)}
            pipeline.xadd(keys.replies(process_id), fields, maxlen=keys.REPLIES_MAXLEN, approximate=True)
            pipeline.expire(keys.replies(process_id), keys.REPLIES_TTL_S)
        now_s = time.monotonic()
        lapsing = [in_hand for in_hand in by_log if in_hand.log_kept_until_s < now_s]
        for in_hand, events in by_log.items():
            pipeline.xadd(keys.job_log(in_hand.job.job_id), {str(index): data for index, data in enumerate(events)})
        for in_hand in lapsing:
            pipeline.expire(keys.job_log(in_hand.job.job_id), keys.JOB_LOG_TTL_S)
        calls = [_call_finish(end, in_hand) for in_hand, end in ends]
        for names, values in calls:
            pipeline.evalsha(digest_script("finish"), len(names), *names, *values)
        answers = pipeline.execute(raise_on_error=False)
        ended = _finish_again(calls, answers[len(answers) - len(calls) :])
        for answer in answers:
            if isinstance(answer, RedisError) and not isinstance(answer, NoScriptError):
                raise answer
        for (in_hand, end), was_ours in zip(ends, ended, strict=True):
            if was_ours and in_hand.keep_log:
                self.recent_ends.add(codec.encode_event(end))
        for in_hand in lapsing:
            in_hand.log_kept_until_s = now_s + PROLONG_LOG_S
        for in_hand, event in batch:
            in_hand.streamed = in_hand.streamed or isinstance(event, Delta)


def _call_finish(event: Finished, in_hand: JobInHand) -> tuple[list[str], list[str | int | bytes]]:
    return finish_arguments(event, reply_to=in_hand.job.reply_to, keep_log=in_hand.keep_log, by=WORKER_ID)


def _finish_again(calls: list[tuple[list[str], list[str | int | bytes]]], answers: list[Any]) -> list[Any]:
    """End those jobs whose script the server did not know: it has just started. The rest of the batch is written already. Returns what
    finish.lua said of each.

    I/O: one Redis trip, if at all. Raises: RedisError.
    """
    unknown = [index for index, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
    if unknown:
        pipeline: Any = get_redis().pipeline(transaction=True)
        for index in unknown:
            names, values = calls[index]
            pipeline.eval(read_script("finish"), len(names), *names, *values)
        for index, answer in zip(unknown, pipeline.execute(), strict=True):
            answers[index] = answer
    return answers


__all__ = ["JobInHand", "Publisher"]
