"""Make the database itself refuse what the ledger's rules forbid, whoever asks.

Usage records, ledger transactions and entries can be added and never changed, deleted or truncated. At commit, the entries of each
transaction that was written must sum to zero, and be at least two. The setting ``aiscale.allow_truncate`` let a session
truncate; 0016 took that away.
"""

from django.db import migrations

APPEND_ONLY_TABLES = ("spend_usagerecord", "spend_ledgertransaction", "spend_ledgerentry")

FUNCTIONS = """
CREATE FUNCTION spend_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' AND coalesce(current_setting('aiscale.allow_truncate', true), '') = 'on' THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION '% is append-only: % is refused. Mend a mistake with an adjusting entry.', TG_TABLE_NAME, TG_OP
        USING ERRCODE = 'restrict_violation';
END $$;

CREATE FUNCTION spend_check_balance() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    checked bigint;
    total numeric;
    entries bigint;
BEGIN
    IF TG_TABLE_NAME = 'spend_ledgertransaction' THEN
        checked := NEW.id;
    ELSE
        checked := NEW.transaction_id;
    END IF;
    SELECT coalesce(sum(amount_nanousd), 0), count(*) INTO total, entries FROM spend_ledgerentry WHERE transaction_id = checked;
    IF total <> 0 OR entries < 2 THEN
        RAISE EXCEPTION 'ledger transaction % has % entries that sum to %: it needs at least two that sum to zero', checked, entries, total
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
"""

BALANCE_TRIGGERS = "".join(
    f"""
CREATE CONSTRAINT TRIGGER {table}_balances AFTER INSERT ON {table}
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION spend_check_balance();
"""
    for table in ("spend_ledgertransaction", "spend_ledgerentry")
)

APPEND_ONLY_TRIGGERS = "".join(
    f"""
CREATE TRIGGER {table}_no_change BEFORE UPDATE OR DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION spend_refuse_change();
CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION spend_refuse_change();
"""
    for table in APPEND_ONLY_TABLES
)

REVERSE = (
    "".join(
        f"DROP TRIGGER {table}_no_change ON {table}; DROP TRIGGER {table}_no_truncate ON {table};"
        for table in APPEND_ONLY_TABLES
    )
    + "".join(f"DROP TRIGGER {table}_balances ON {table};" for table in ("spend_ledgertransaction", "spend_ledgerentry"))
    + "DROP FUNCTION spend_check_balance(); DROP FUNCTION spend_refuse_change();"
)


class Migration(migrations.Migration):
    dependencies = [("spend", "0001_spend")]

    operations = [
        migrations.RunSQL(FUNCTIONS + BALANCE_TRIGGERS + APPEND_ONLY_TRIGGERS, REVERSE),
    ]
