"""Budgets that were set before budgets had scopes stay in force through the migration, forward and back."""

import pytest
from django.db import connection
from django.db.migrations.executor import MigrationExecutor

pytestmark = pytest.mark.django_db(transaction=True)

BEFORE, AFTER = [("spend", "0002_append_only")], [("spend", "0003_budgets")]


def migrate(targets):
    executor = MigrationExecutor(connection)
    executor.migrate(targets)
    return MigrationExecutor(connection).loader.project_state(targets).apps


def test_an_organizations_budget_becomes_one_with_a_scope():
    latest = MigrationExecutor(connection).loader.graph.leaf_nodes()
    try:
        old = migrate([*BEFORE, ("accounts", "0003_limits")])
        plan = old.get_model("accounts", "Plan").objects.create(
            public_id="plan_1", slug="p", requests_per_window=1, window_s=1, max_in_flight=1, monthly_limit_nanousd=1
        )
        organization = old.get_model("accounts", "Organization").objects.create(
            public_id="org_1", name="Ada's", plan=plan
        )
        old.get_model("spend", "Budget").objects.create(
            public_id="budget_1", organization=organization, monthly_limit_nanousd=77, note="kept"
        )
        budget = migrate(AFTER).get_model("spend", "Budget").objects.get()
        assert (budget.scope, budget.period, budget.time_zone) == ("organization:org_1", "monthly", "UTC")
        assert (budget.limit_nanousd, budget.note) == (77, "kept")
        again = migrate(BEFORE).get_model("spend", "Budget").objects.get()
        assert (again.organization.public_id, again.monthly_limit_nanousd) == ("org_1", 77)
    finally:
        migrate(latest)
