"""Let an upstream answer when our own workers cannot: none is there, there is no room, or the one that had the job was lost.

The answer is then the fallback model's, at its own price, under the limits and kill switches that hold for it.
"""

import logging
from functools import partial

from aiscale.errors import AiscaleError, Code
from apps.accounts.callers import Caller
from apps.inference import catalog, completions, presence, relays
from apps.inference.catalog import CatalogModel
from apps.inference.completions import CompletionRequest, Prepared, Run

log = logging.getLogger(__name__)

SUFFIX = "_f"
"""Ends the names of jobs that took another's place: both may have been begun, and each is settled for itself."""


async def start(
    request: CompletionRequest, caller: Caller, model: CatalogModel, prepared: Prepared | None = None
) -> Run:
    """Start a request on our workers, or on the model's fallback.

    I/O: as `completions.start`, and a look at the workers' presence once a second. Raises: AiscaleError.
    """
    fallback = await catalog.find_fallback(model)
    if fallback is None or request.goes_on or request.top_logprobs is not None:
        return await completions.start_local(request, caller, model, prepared)
    begin = partial(relays.start, request, caller, fallback, SUFFIX)
    if not await presence.is_served(model.slug, model.version):
        log.warning("no worker serves %s: %s answers", model.slug, fallback.slug, extra={"model": model.slug})
        try:
            return await begin()
        except AiscaleError as error:
            if error.code is not Code.MODEL_NOT_ALLOWED:
                raise
            return await completions.start_local(request, caller, model, prepared)
    try:
        run = await completions.start_local(request, caller, model, prepared)
    except AiscaleError as refusal:
        if refusal.code is not Code.QUEUE_FULL:
            raise
        try:
            return await begin()
        except AiscaleError:
            log.warning("the fallback %s cannot help either", fallback.slug, exc_info=True)
            raise refusal from None
    if not request.keep_log:
        # who comes back to an answer knows it by its job's name: such a one stays with its job
        run.rescue = begin
    return run
