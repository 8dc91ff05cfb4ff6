"""Whoever adds a URL, a route of ``/v1`` or a frame says who may use it: WRITE_ACCESS_TABLE=1 pytest tests/apps/access writes the table."""

from tests.apps.access.test_access import test_the_table_has_a_row_for_all_that_is_there_and_no_other

__all__ = ["test_the_table_has_a_row_for_all_that_is_there_and_no_other"]
