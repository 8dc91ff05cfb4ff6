"""Hold the one arithmetic of prices: the worst case at admission and the real cost at settlement both come from here (M5)."""

from aiscale.errors import AiscaleError, Code

COST_CEILING_NANOUSD = 1 << 53
"""The most that one request can cost: what Lua counts exactly. Anything above is a mistake in a price."""


def cost_nanousd(
    prompt_tokens: int,
    completion_tokens: int,
    *,
    prompt_nanousd_per_token: int,
    completion_nanousd_per_token: int,
) -> int:
    """Return what so many tokens cost, exactly, in whole nano-US-dollars.

    Raises: AiscaleError (BACKEND_UNAVAILABLE) for a negative count or price, or an impossible sum: a mistake in the
    catalog refuses requests, and never makes a balance grow (M10).
    """
    numbers = (prompt_tokens, completion_tokens, prompt_nanousd_per_token, completion_nanousd_per_token)
    cost = prompt_tokens * prompt_nanousd_per_token + completion_tokens * completion_nanousd_per_token
    if min(numbers) < 0 or cost > COST_CEILING_NANOUSD:
        raise AiscaleError(
            Code.BACKEND_UNAVAILABLE,
            "This model's price is set wrongly, so it cannot be used. Tell the administrator of this service.",
        )
    return cost
