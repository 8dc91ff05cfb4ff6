"""Refuse to truncate the ledger, prices and corrections whatever a session has set. Replaces a function: no table is locked."""

from django.db import migrations

STRICT = """
CREATE OR REPLACE FUNCTION spend_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: % is refused. Mend a mistake with an adjusting entry.', TG_TABLE_NAME, TG_OP
        USING ERRCODE = 'restrict_violation';
END $$;
"""


class Migration(migrations.Migration):
    dependencies = [("spend", "0015_usage_of_cached_answers")]

    operations = [migrations.RunSQL(STRICT, migrations.RunSQL.noop)]
