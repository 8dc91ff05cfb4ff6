"""Refuse to truncate the audit log whatever a session has set. Replaces a function: no table is locked, and nothing is read."""

from django.db import migrations

STRICT = """
CREATE OR REPLACE FUNCTION accounts_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: % is refused.', TG_TABLE_NAME, TG_OP USING ERRCODE = 'restrict_violation';
END $$;
"""


class Migration(migrations.Migration):
    dependencies = [("accounts", "0011_semantic_cache")]

    operations = [migrations.RunSQL(STRICT, migrations.RunSQL.noop)]
