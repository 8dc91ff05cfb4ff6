"""Say on which terms a request runs: at once at the model's price, or in bulk at half of it and after everybody else."""

import msgspec

from aiscale.wire.broker import BULK_PRIORITY
from apps.accounts.callers import Caller, PlanLimits
from apps.inference.catalog import CatalogModel


def apply(caller: Caller, model: CatalogModel, plan: PlanLimits) -> tuple[CatalogModel, PlanLimits]:
    """Return model and plan as they hold for this caller's lane."""
    if caller.lane != "batch":
        return model, plan
    return msgspec.structs.replace(model, terms=model.terms.in_bulk()), msgspec.structs.replace(
        plan, priority=BULK_PRIORITY
    )


def name_job(request_id: str) -> str:
    """Return the id of a request's job. A second try of the same request has the same, and is charged once."""
    return f"job_{request_id.removeprefix('req_')}"
