"""Keep what a key may spend in a month, as a budget of the key (`apps.accounts.key_limits`)."""

from apps.spend import budgets, periods, totals
from apps.spend.models import Budget


def set_limit(key_id: str, organization_id: str, limit_nanousd: int | None) -> None:
    """Make, change or (None) delete the key's budget for the months of its organization. I/O: SQL; Redis trips after the commit."""
    if limit_nanousd is None:
        for budget in Budget.objects.filter(scope=f"key:{key_id}", period=Budget.Period.MONTHLY):
            budget.delete()
        return
    Budget.objects.update_or_create(
        scope=f"key:{key_id}",
        period=Budget.Period.MONTHLY,
        defaults={"limit_nanousd": limit_nanousd, "time_zone": budgets.month_zone(organization_id)},
    )


def read_months(key_ids: list[str]) -> dict[str, tuple[int | None, int]]:
    """Return limit and spending of this month, by key, of those that have a budget for the month. I/O: two SQL statements."""
    scopes = {f"key:{key_id}": key_id for key_id in key_ids}
    rows = Budget.objects.filter(scope__in=scopes, period=Budget.Period.MONTHLY)
    now_ms = periods.now_ms()
    limits = {row.scope: budgets.limit_of(row, now_ms) for row in rows}
    spent = {
        total.scope: total.spent_nanousd
        for total in totals.read(limits, now_ms)
        if total.period == Budget.Period.MONTHLY
    }
    return {scopes[scope]: (limit, spent.get(scope, 0)) for scope, limit in limits.items()}
