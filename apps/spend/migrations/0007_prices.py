"""Give prices rows with a beginning, and usage records the row that they were charged by.

The database refuses to change a price, and one that would begin in the past of a model that has a price already: the price in force at a
moment that is over stays what it was.
"""

from django.db import migrations, models

import aiscale.db

TRIGGERS = """
CREATE FUNCTION spend_check_price() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.valid_from < now() - interval '1 minute' AND EXISTS (SELECT 1 FROM spend_price WHERE model = NEW.model) THEN
        RAISE EXCEPTION 'a price of % cannot begin in the past, at %', NEW.model, NEW.valid_from
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER spend_price_begins BEFORE INSERT ON spend_price FOR EACH ROW EXECUTE FUNCTION spend_check_price();
CREATE TRIGGER spend_price_no_change BEFORE UPDATE OR DELETE ON spend_price
    FOR EACH ROW EXECUTE FUNCTION spend_refuse_change();
CREATE TRIGGER spend_price_no_truncate BEFORE TRUNCATE ON spend_price
    FOR EACH STATEMENT EXECUTE FUNCTION spend_refuse_change();
"""

REVERSE = """
DROP TRIGGER spend_price_begins ON spend_price;
DROP TRIGGER spend_price_no_change ON spend_price;
DROP TRIGGER spend_price_no_truncate ON spend_price;
DROP FUNCTION spend_check_price();
"""


class Migration(migrations.Migration):
    dependencies = [("spend", "0006_ledger_without_usage")]

    operations = [
        migrations.CreateModel(
            name="Price",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("public_id", models.CharField(editable=False, max_length=40, unique=True)),
                ("created_at", models.DateTimeField(auto_now_add=True)),
                ("updated_at", models.DateTimeField(auto_now=True)),
                ("model", models.CharField(max_length=128)),
                ("valid_from", models.DateTimeField()),
                ("prompt_nanousd_per_token", aiscale.db.NanoUsdField()),
                ("cached_prompt_nanousd_per_token", aiscale.db.NanoUsdField()),
                ("completion_nanousd_per_token", aiscale.db.NanoUsdField()),
                ("request_nanousd", aiscale.db.NanoUsdField(default=0)),
                ("reason", models.CharField(blank=True, max_length=300)),
            ],
            options={
                "ordering": ["model", "-valid_from", "-id"],
                "indexes": [models.Index(fields=["model", "-valid_from", "-id"], name="price_by_model")],
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(
                            prompt_nanousd_per_token__range=(0, 1_000_000_000),
                            cached_prompt_nanousd_per_token__gte=0,
                            cached_prompt_nanousd_per_token__lte=models.F("prompt_nanousd_per_token"),
                            completion_nanousd_per_token__range=(0, 1_000_000_000),
                            request_nanousd__range=(0, 1_000_000_000_000),
                        ),
                        name="price_is_possible",
                    )
                ],
            },
        ),
        migrations.AddField("usagerecord", "cached_tokens", models.BigIntegerField(db_default=0, default=0)),
        migrations.AddField(
            "usagerecord", "price_id", models.CharField(blank=True, db_default="", default="", max_length=40)
        ),
        migrations.AddField("usagerecord", "cached_prompt_nanousd_per_token", aiscale.db.NanoUsdField(null=True)),
        migrations.AddField("usagerecord", "request_nanousd", aiscale.db.NanoUsdField(db_default=0, default=0)),
        migrations.AddField(
            "usagerecord", "end_detail", models.CharField(blank=True, db_default="", default="", max_length=300)
        ),
        migrations.RunSQL(TRIGGERS, REVERSE),
    ]
