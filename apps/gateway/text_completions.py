"""Answer ``POST /v1/completions``: go on from a text, without a chat template. Each prompt is a job of its own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from aiscale.errors import AiscaleError, Code
from aiscale.wire.events import Delta, Event, Finished
from apps.accounts.callers import Caller
from apps.gateway import obfuscation
from apps.gateway.cache_wishes import read_wish
from apps.gateway.chat_schema import read_bias, read_stop
from apps.gateway.exchange import Exchange
from apps.gateway.streaming import COMMENT, check_end, merge, with_silences
from apps.gateway.text_choices import Offsets, TextChoice, choose_best
from apps.gateway.text_schema import TextBody, read_text
from apps.inference import catalog, completions, lanes, prompts
from apps.inference.completions import CompletionRequest, Run

Answer = tuple[Run, list[TextChoice], Finished]

BUSY = (Code.TOO_MANY_IN_FLIGHT, Code.QUEUE_FULL)
"""Refusals that the end of one of the request's own jobs may lift."""
SETTLE_TRIES, SETTLE_PAUSE_S = 50, 0.1
"""A job that has ended leaves its place a moment later, when it is settled."""


async def answer_text(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Complete every prompt, streamed or whole. Raises: AiscaleError before the first byte."""
    text, given = read_text(body)
    model = await catalog.get_model(text.model, "generate")
    for prompt in given:
        await prompts.encode_prompt(model, prompt)  # all are possible before any is begun
    echoes = [await _write_prompt(model, prompt) if text.echo else "" for prompt in given]
    requests = [_make_request(exchange, text, prompt, index) for index, prompt in enumerate(given)]
    async with AsyncExitStack() as stack:
        if text.stream:
            # all run at once, or the request is refused: a stream cannot be
            runs = [await stack.enter_async_context(await completions.start(request, caller)) for request in requests]
            await _stream(exchange, text, runs, echoes)
        else:
            await _answer_whole(exchange, text, await _run_all(stack, requests, caller), echoes)


def _make_request(exchange: Exchange, text: TextBody, prompt: str | list[int], index: int) -> CompletionRequest:
    return CompletionRequest(
        request_id=exchange.request_id,
        source="api",
        model=text.model,
        messages=[],
        words=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=prompt if isinstance(prompt, list) else None,
        cache=read_wish(exchange, text.cache),
        job_id=lanes.name_job(exchange.request_id) + (f"_{index}" if index else ""),
        max_tokens=text.max_tokens,
        temperature=text.temperature,
        top_p=text.top_p,
        presence_penalty=text.presence_penalty,
        frequency_penalty=text.frequency_penalty,
        logit_bias=read_bias(text.logit_bias),
        stop=read_stop(text.stop),
        # equal prompts with one seed would be equal answers; each of several has its own
        seed=None if text.seed is None else text.seed + index * text.made,
        n=text.made,
        # the likelihoods say which are the best
        top_logprobs=text.logprobs if text.logprobs is not None or text.made == text.n else 0,
    )


async def _write_prompt(model: catalog.CatalogModel, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else await prompts.decode(model, prompt)


async def _run_all(stack: AsyncExitStack, requests: list[CompletionRequest], caller: Caller) -> list[Answer]:
    """Run every request and return the answers in their order. When a limit leaves no room, the rest waits for those that run."""
    running: dict[int, asyncio.Task[Answer]] = {}
    try:
        for index, request in enumerate(requests):
            run = await _start(stack, request, caller, list(running.values()))
            running[index] = asyncio.create_task(_read(run))
        return [await running[index] for index in range(len(requests))]
    finally:
        for task in running.values():
            task.cancel()


async def _start(
    stack: AsyncExitStack, request: CompletionRequest, caller: Caller, before: list[asyncio.Task[Any]]
) -> Run:
    for _ in range(SETTLE_TRIES + len(before)):
        try:
            return await stack.enter_async_context(await completions.start(request, caller))
        except AiscaleError as error:
            if error.code not in BUSY or not before:
                raise
            busy, pending = error, [task for task in before if not task.done()]
        if pending:
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(SETTLE_PAUSE_S)
    raise busy


async def _read(run: Run) -> Answer:
    """Listen to the end. Raises: AiscaleError for any end but a good one."""
    choices = [TextChoice() for _ in range(run.n)]
    async for event in run.events():
        if isinstance(event, Delta):
            choices[event.index].take(event)
        elif isinstance(event, Finished):
            check_end(run, event)
            return run, choices, event
    raise AssertionError("a run ended without its last event")


async def _answer_whole(exchange: Exchange, text: TextBody, answers: list[Answer], echoes: list[str]) -> None:
    choices: list[dict[str, Any]] = []
    for (_, made, event), echo in zip(answers, echoes, strict=True):
        for choice in choose_best(made, text.n):
            logprobs = None if text.logprobs is None else Offsets().describe(choice.logprobs)
            said, reason = echo + "".join(choice.text), choice.finish_reason or event.finish_reason
            choices.append(_choice(len(choices), said, reason, logprobs))
    usage = _usage([event for _, _, event in answers])
    first, last = answers[0][0], answers[-1][0]
    await exchange.send_json(200, _head(first) | {"choices": choices, "usage": usage}, last.headers)


async def _stream(exchange: Exchange, text: TextBody, runs: list[Run], echoes: list[str]) -> None:
    with_usage = text.stream_options is not None and text.stream_options.include_usage
    exchange.obfuscates = obfuscation.is_wished(text.stream_options)
    head = _head(runs[0]) | ({"usage": None} if with_usage else {})
    ends: list[Finished] = []
    offsets = [Offsets() for _ in range(len(runs) * text.n)]
    events: AsyncIterator[tuple[int, Event]] = merge([run.events() for run in runs])
    async for item in with_silences(events):
        index, event = item if item is not None else (0, None)
        if isinstance(event, Finished):
            check_end(runs[index], event)
            ends.append(event)
        if not exchange.started:
            if event is not None and not isinstance(event, Delta | Finished):
                continue
            await exchange.start_stream(runs[-1].headers)
            for number in range(len(runs) * text.n):
                if echo := echoes[number // text.n]:
                    await exchange.send_event(head | {"choices": [_choice(number, echo)]})
        if event is None:
            await exchange.send_part(COMMENT)
        elif isinstance(event, Delta):
            number = index * text.n + event.index
            logprobs = None if text.logprobs is None else offsets[number].describe(list(event.logprobs))
            await exchange.send_event(head | {"choices": [_choice(number, event.text, event.end, logprobs)]})
        elif isinstance(event, Finished) and text.n == 1:
            await exchange.send_event(head | {"choices": [_choice(index, "", event.finish_reason)]})
    if with_usage:
        await exchange.send_event(head | {"choices": [], "usage": _usage(ends)})
    await exchange.end_stream(b"data: [DONE]\n\n")


def _head(run: Run) -> dict[str, Any]:
    return {
        "id": f"cmpl-{run.job_id.removeprefix('job_')}",
        "object": "text_completion",
        "created": run.created_at_s,
        "model": run.model,
        "system_fingerprint": f"fp_{run.model_version}",
    }


def _choice(index: int, text: str, finish_reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _usage(ends: list[Finished]) -> dict[str, Any]:
    prompt, completion = sum(end.prompt_tokens for end in ends), sum(end.completion_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in ends)},
    }
