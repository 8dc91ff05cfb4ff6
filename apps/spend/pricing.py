"""Hold the one arithmetic of prices: the worst case at admission and the real cost at settlement both come from here (M5)."""

from aiscale.errors import AiscaleError, Code

COST_CEILING_NANOUSD = 1 << 53
"""The most that one request can cost: what Lua counts exactly. Anything above is a mistake in a price."""


def cost_nanousd(
    prompt_tokens: int,
    completion_tokens: int,
    cached_tokens: int = 0,
    *,
    prompt_nanousd_per_token: int,
    completion_nanousd_per_token: int,
    cached_prompt_nanousd_per_token: int | None = None,
    request_nanousd: int = 0,
) -> int:
    """Return what so many tokens cost, exactly, in whole nano-US-dollars.

    ``cached_tokens`` are those of the prompt that came from the cache; without a price of their own they cost what the others do.
    ``request_nanousd`` is added when anything was computed at all.
    Raises: AiscaleError (BACKEND_UNAVAILABLE) for a negative count or price, or an impossible sum: a mistake in the
    catalog refuses requests, and never makes a balance grow (M10).
    """
    cached_price = (
        prompt_nanousd_per_token if cached_prompt_nanousd_per_token is None else cached_prompt_nanousd_per_token
    )
    fresh_tokens = prompt_tokens - cached_tokens
    flat = request_nanousd if prompt_tokens or completion_tokens else 0
    cost = (
        fresh_tokens * prompt_nanousd_per_token
        + cached_tokens * cached_price
        + completion_tokens * completion_nanousd_per_token
        + flat
    )
    counts = (fresh_tokens, cached_tokens, completion_tokens)
    prices = (prompt_nanousd_per_token, cached_price, completion_nanousd_per_token, request_nanousd)
    if min(*counts, *prices) < 0 or cost > COST_CEILING_NANOUSD:
        raise AiscaleError(
            Code.BACKEND_UNAVAILABLE,
            "This model's price is set wrongly, so it cannot be used. Tell the administrator of this service.",
        )
    return cost
