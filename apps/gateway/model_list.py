"""Answer ``GET /v1/models``."""

from typing import Any

from aiscale.errors import AiscaleError, Code
from apps.accounts import callers
from apps.accounts.callers import Caller
from apps.gateway.exchange import Exchange
from apps.inference import catalog
from apps.inference.catalog import CatalogModel


async def answer_models(exchange: Exchange, caller: Caller) -> None:
    """List the models that the caller's plan allows."""
    models = await catalog.list_models(await callers.get_plan(caller.plan))
    await exchange.send_json(200, {"object": "list", "data": [_describe(model) for model in models]})


async def answer_model(exchange: Exchange, caller: Caller, slug: str) -> None:
    """Describe one model. Raises: AiscaleError (MODEL_NOT_FOUND), also for one that the plan does not allow."""
    plan = await callers.get_plan(caller.plan)
    model = await catalog.get_model(slug)
    if not plan.allows(model.slug):
        raise AiscaleError(Code.MODEL_NOT_FOUND, f"The model {slug[:100]!r} does not exist.", param="model")
    await exchange.send_json(200, _describe(model))


def _describe(model: CatalogModel) -> dict[str, Any]:
    return {"id": model.slug, "object": "model", "created": model.created_at_s, "owned_by": "aiscale"}
