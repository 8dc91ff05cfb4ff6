"""Answer ``POST /v1/responses`` and ``/v1/responses/input_tokens``."""

from typing import Any

from aiscale.errors import AiscaleError, Code
from aiscale.wire.events import Delta, Finished
from aiscale.wire.jobs import Grammar
from apps.accounts.callers import Caller, on_thread
from apps.gateway import obfuscation, parameters
from apps.gateway.cache_wishes import read_wish
from apps.gateway.exchange import Exchange
from apps.gateway.formats import read_format
from apps.gateway.responses import objects, storage
from apps.gateway.responses.following import Follower
from apps.gateway.responses.items import join_calls, read_tools
from apps.gateway.responses.output import Output
from apps.gateway.responses.schema import InputBody, read_input, read_response
from apps.gateway.responses.stream import Stream
from apps.gateway.streaming import check_end
from apps.gateway.tool_schema import check_results
from apps.inference import catalog, completions, prompts
from apps.inference.completions import CompletionRequest, Run
from apps.inference.prompts import ChatMessage
from apps.inference.tools import Tools

NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}


async def answer_creation(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Make a response: whole, streamed, or in the background. Raises: AiscaleError before the first byte."""
    wanted, said = read_response(body)
    messages, tools, grammar = await _read_prompt(wanted, said, caller)
    request = CompletionRequest(
        request_id=exchange.request_id,
        source="api",
        model=wanted.model,
        messages=messages,
        max_tokens=wanted.max_output_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        grammar=grammar,
        tools=tools,
        cache=read_wish(exchange, wanted.cache),
        # the log outlives this process: what becomes of a stored response can always be found out
        keep_log=wanted.store,
    )
    with parameters.renamed(NAMES):
        run = await completions.start(request, caller)
    async with run:
        head = objects.make_head(wanted, run, objects.make_response_id(exchange.request_id))
        if wanted.store:
            previous_id = wanted.previous_response_id or ""
            await on_thread(lambda: storage.create(caller.organization_id, head, run.job_id, said, previous_id))
        if wanted.background:
            run.detach()
            if not wanted.stream:
                await exchange.send_json(200, head, run.headers)
                return
            # told from the log: a client that leaves ends nothing, and may come back
            exchange.obfuscates = obfuscation.is_wished(wanted.stream_options)
            await Stream(exchange, head, Follower(run.job_id, head, run.headers), is_own=False).send()
        elif wanted.stream:
            exchange.obfuscates = obfuscation.is_wished(wanted.stream_options)
            await Stream(exchange, head, run).send()
        else:
            await exchange.send_json(200, await _wait(head, run), run.headers)


async def answer_count(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Count the tokens of an input, as they would be charged. Costs nothing. Raises: AiscaleError."""
    wanted, said = read_input(body)
    messages, tools, _ = await _read_prompt(wanted, said, caller)
    with parameters.renamed(NAMES):
        model = await catalog.get_model(wanted.model, "generate")
        tokens = await prompts.build_prompt(model, messages, tools)
    await exchange.send_json(200, {"object": "response.input_tokens", "input_tokens": len(tokens)})


async def _read_prompt(
    wanted: InputBody, said: list[ChatMessage], caller: Caller
) -> tuple[list[ChatMessage], Tools | None, Grammar | None]:
    """Return all turns, what was said before among them, the tools and what the text is held to. Raises: AiscaleError."""
    with parameters.renamed(NAMES):
        grammar = read_format(wanted.text.format, described_in=None)
    before = await _read_before(wanted, caller)
    tools = read_tools(wanted.tools, wanted.tool_choice, wanted.parallel_tool_calls)
    if tools is not None and grammar is not None:
        message = "An answer of a text.format cannot call tools. Leave out text.format, or tools."
        raise AiscaleError(Code.UNSUPPORTED_PARAMETER, message, param="text.format")
    check_results([*before, *said], "input")
    system = [ChatMessage(role="system", content=wanted.instructions)] if wanted.instructions else []
    return join_calls([*system, *before, *said]), tools, grammar


async def _read_before(wanted: InputBody, caller: Caller) -> list[ChatMessage]:
    if not wanted.previous_response_id:
        return []
    previous_id = wanted.previous_response_id
    return await on_thread(lambda: storage.read_conversation(caller.organization_id, previous_id))


async def _wait(head: dict[str, Any], run: Run) -> dict[str, Any]:
    output, made = Output(head["id"]), dict[str, Any]()
    try:
        async for event in run.events():
            if isinstance(event, Delta):
                output.add(event)
            elif isinstance(event, Finished):
                items = output.describe(is_whole=event.finish_reason == "stop")
                made = objects.make_rest(items, event)
                check_end(run, event)
                response = objects.end(head, items, event)
    except AiscaleError as error:
        await storage.keep(objects.fail(head, error, made))
        raise
    await storage.keep(response)
    return response
