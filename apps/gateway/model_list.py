"""Answer ``/v1/models``, in OpenAI's shape or, when asked by one of its clients, in Anthropic's."""

from datetime import UTC, datetime
from typing import Any

from aiscale.errors import AiscaleError, Code
from apps.accounts import callers
from apps.accounts.callers import Caller, PlanLimits
from apps.gateway.dialects import ANTHROPIC
from apps.gateway.exchange import Exchange
from apps.gateway.messages import pages
from apps.gateway.parameters import QUERIES_OF_CLIENTS, read_query
from apps.inference import catalog, completions, moderation, prompts
from apps.inference.catalog import CatalogModel


async def answer_models(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """List the models that the caller's plan and key allow: in Anthropic's shape a page of them, else all unless a page is asked for.

    Raises: AiscaleError (INVALID_REQUEST; NOT_FOUND for an id that is not in the list)."""
    query = read_query(exchange.query_string, known=pages.PARAMETERS, defaults_only=QUERIES_OF_CLIENTS)
    page = pages.read_page(query)
    plan = await callers.get_plan(caller.plan)
    allowed = await catalog.list_models(plan)
    models = [model for model in allowed if caller.allows(model.slug)]
    if exchange.dialect is ANTHROPIC:
        await exchange.send_json(200, pages.cut([_describe_to_anthropic(model, plan) for model in models], page))
        return
    data = [_describe(model) for model in models]
    asked = pages.cut(data, page) if any(name in query for name in pages.PARAMETERS) else {"data": data}
    await exchange.send_json(200, {"object": "list", **asked})


async def answer_model(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Describe one model. Raises: AiscaleError (MODEL_NOT_FOUND), also for one that the plan or the key does not allow."""
    slug = exchange.path_values["model"]
    plan = await callers.get_plan(caller.plan)
    model = await catalog.get_model(slug)
    if not (plan.allows(model.slug) and caller.allows(model.slug)):
        raise AiscaleError(Code.MODEL_NOT_FOUND, f"The model {slug[:100]!r} does not exist.", param="model")
    value = _describe_to_anthropic(model, plan) if exchange.dialect is ANTHROPIC else _describe(model)
    await exchange.send_json(200, value)


async def refuse_model_deletion(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Raise: AiscaleError (MODEL_NOT_ALLOWED)."""
    raise AiscaleError(
        Code.MODEL_NOT_ALLOWED,
        "Models of this service cannot be deleted over the API. Its administrator takes them out of the catalog.",
        param="model",
    )


def _describe(model: CatalogModel) -> dict[str, Any]:
    """Say what OpenAI's clients know, and what else helps to choose."""
    head = {"id": model.slug, "object": "model", "created": model.created_at_s, "owned_by": "aiscale"}
    return {**head, "aiscale": describe_capabilities(model)}


def describe_capabilities(model: CatalogModel) -> dict[str, Any]:
    """Say what a model can be asked for; ``batch_invariant``: its greedy and seeded answers are the same whatever shares their batch."""
    facts: dict[str, Any] = {"name": model.name, "kind": model.kind, "context_tokens": model.context_tokens}
    if model.upstream is not None and model.kind == "embed":
        return {**facts, "served_by": "upstream", "dimensions": model.dimensions or None, "endpoints": ["embeddings"]}
    if model.upstream is not None:
        return {**facts, "served_by": "upstream", "endpoints": ["chat.completions", "responses", "messages"]}
    facts |= {"served_by": "workers", "version": model.version, "precision": model.precision}
    if model.kind == "embed":
        return {**facts, "dimensions": model.dimensions, "endpoints": ["embeddings"]}
    chats = ["chat.completions", "responses", "messages"] if model.takes_chats else []
    if model.kind == "classify":
        return {**facts, "labels": find_labels(model), "endpoints": ["moderations"]}
    formats = ["text", "json_object", "json_schema"]
    return {
        **facts,
        "endpoints": [*chats, "completions"],
        "response_formats": formats,
        "supports_tools": find_tools_support(model),
        "batch_invariant": model.batch_invariant,
    }


def find_tools_support(model: CatalogModel) -> bool:
    """Say whether a model's template tells it of tools; no, where its files are not here."""
    try:
        return prompts.get_reader(model).supports_tools
    except AiscaleError:
        return False


def find_labels(model: CatalogModel) -> list[str]:
    """List what a classifier tells apart; nothing, where its files are not here."""
    try:
        return list(moderation.get_labels(model).names)
    except AiscaleError:
        return []


def _describe_to_anthropic(model: CatalogModel, plan: PlanLimits) -> dict[str, Any]:
    """Say what Anthropic's clients know: what is in the catalog is active, and belongs to none of Anthropic's lines."""
    writes = model.kind == "generate"
    context = completions.count_context_tokens(model, plan) if writes else model.context_tokens
    created = datetime.fromtimestamp(model.created_at_s, UTC)
    return {
        "type": "model",
        "id": model.slug,
        "display_name": model.name,
        "created_at": f"{created:%Y-%m-%dT%H:%M:%SZ}",
        "lifecycle": "active",
        "deprecated_at": None,
        "retires_at": None,
        "line": None,
        "max_input_tokens": context,
        "max_tokens": min(plan.max_output_tokens, context) if writes else None,
        "capabilities": None,
    }
