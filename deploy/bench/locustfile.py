"""Be the users of `make loadtest`: many keys of three plans, texts by Zipf's law, embeddings beside classifications, each user at a pace of
its own, whatever the server does (an open load as far as Locust can: a user whose answer is late asks again at once)."""

import itertools
import json
import os
import random

from locust import FastHttpUser, constant_throughput, task

from deploy.bench.orders import classify, draw_zipf, embed

KEYS: list[str] = json.loads(os.environ["BENCH_KEYS"])
USERS = int(os.environ["BENCH_USERS"])
RATE = float(os.environ["BENCH_RATE"])
RANKS = itertools.cycle(draw_zipf(random.Random(11), 100_000))  # noqa: S311 - a load, no secret


class Caller(FastHttpUser):  # type: ignore[misc]
    """Ask with one key."""

    wait_time = constant_throughput(RATE / USERS)
    connection_timeout = network_timeout = 30.0

    def on_start(self) -> None:
        self.headers = {"authorization": f"Bearer {random.choice(KEYS)}", "content-type": "application/json"}  # noqa: S311

    @task(3)
    def embed(self) -> None:
        self._ask(*embed(next(RANKS)))

    @task(1)
    def classify(self) -> None:
        self._ask(*classify(next(RANKS)))

    def _ask(self, path: str, body: bytes) -> None:
        with self.client.post(path, body, headers=self.headers, catch_response=True, name=path) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
            else:
                level = answer.headers.get("x-aiscale-cache", "none")
                self.environment.events.request.fire(
                    request_type="cache", name=level, response_time=0, response_length=0, exception=None, context={}
                )
