"""Empty the database after tests that commit."""

from typing import Any

from django.db import connection

KEPT_TABLES = ("django_migrations", "django_content_type", "auth_permission")
"""What migrating filled, and no test changes."""

# deleting a few rows is quicker than truncating: that makes each table's and index's file anew. Locked first, so that what another
# connection has not committed yet is waited for and deleted too. "replica": foreign keys and append-only triggers are not asked
_EMPTY = """
DO $$
DECLARE name text;
BEGIN
    PERFORM set_config('session_replication_role', 'replica', true);
    FOR name IN
        SELECT format('%I.%I', schemaname, tablename) FROM pg_tables
        WHERE schemaname = current_schema() AND tablename <> ALL ('{KEPT}') ORDER BY tablename
    LOOP
        EXECUTE 'LOCK TABLE ' || name || ' IN ACCESS EXCLUSIVE MODE';
        EXECUTE 'DELETE FROM ' || name;
    END LOOP;
END $$
""".replace("KEPT", ",".join(KEPT_TABLES))


def empty_tables(test: Any) -> None:
    """Do what Django's ``TransactionTestCase`` does after a test, without making permissions anew. I/O: one query; superusers only."""
    with connection.cursor() as cursor:
        cursor.execute(_EMPTY)
