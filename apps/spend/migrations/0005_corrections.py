"""Correct what single requests cost, by rows that are only ever added.

The database refuses corrections that give back more than a request cost. Rivals that correct requests of one organization wait for each
other under an advisory lock (the same as `apps.spend.corrections` takes), so the sum that is checked is the sum that is committed.
"""

import django.db.models.deletion
from django.db import migrations, models

import aiscale.db

TRIGGERS = """
CREATE FUNCTION spend_check_corrections() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    payer text;
    wrong record;
BEGIN
    FOR payer IN
        SELECT DISTINCT organization_id FROM spend_usagerecord WHERE id IN (SELECT usage_id FROM fresh) ORDER BY 1
    LOOP
        PERFORM pg_advisory_xact_lock(hashtextextended(payer, 7146002));
    END LOOP;
    SELECT u.job_id, u.cost_nanousd, sum(c.amount_nanousd) AS corrected INTO wrong
        FROM spend_correction c JOIN spend_usagerecord u ON u.id = c.usage_id
        WHERE c.usage_id IN (SELECT usage_id FROM fresh)
        GROUP BY u.id HAVING u.cost_nanousd + sum(c.amount_nanousd) < 0 LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION '% cost % and its corrections sum to %: more than was charged cannot be given back',
            wrong.job_id, wrong.cost_nanousd, wrong.corrected USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER spend_correction_fits AFTER INSERT ON spend_correction REFERENCING NEW TABLE AS fresh
    FOR EACH STATEMENT EXECUTE FUNCTION spend_check_corrections();
CREATE TRIGGER spend_correction_no_change BEFORE UPDATE OR DELETE ON spend_correction
    FOR EACH ROW EXECUTE FUNCTION spend_refuse_change();
CREATE TRIGGER spend_correction_no_truncate BEFORE TRUNCATE ON spend_correction
    FOR EACH STATEMENT EXECUTE FUNCTION spend_refuse_change();
"""

REVERSE = """
DROP TRIGGER spend_correction_fits ON spend_correction;
DROP TRIGGER spend_correction_no_change ON spend_correction;
DROP TRIGGER spend_correction_no_truncate ON spend_correction;
DROP FUNCTION spend_check_corrections();
"""


class Migration(migrations.Migration):
    dependencies = [("spend", "0004_kill_switch_until")]

    operations = [
        migrations.CreateModel(
            name="Correction",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("amount_nanousd", aiscale.db.NanoUsdField()),
                (
                    "transaction",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="corrections",
                        to="spend.ledgertransaction",
                    ),
                ),
                (
                    "usage",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="corrections",
                        to="spend.usagerecord",
                    ),
                ),
            ],
            options={
                "constraints": [
                    models.UniqueConstraint(fields=["usage", "transaction"], name="correction_once_in_a_transaction"),
                    models.CheckConstraint(
                        condition=~models.Q(amount_nanousd=0), name="correction_changes_something"
                    ),
                ],
            },
        ),
        migrations.AlterField(
            model_name="ledgertransaction",
            name="kind",
            field=models.CharField(
                choices=[
                    ("usage", "Usage"),
                    ("credit", "Credit"),
                    ("refund", "Refund"),
                    ("adjustment", "Adjustment"),
                    ("carryover", "Carryover"),
                ],
                max_length=16,
            ),
        ),
        migrations.RunSQL(TRIGGERS, REVERSE),
    ]
