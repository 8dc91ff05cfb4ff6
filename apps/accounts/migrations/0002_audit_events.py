"""Keep who changed what. The database itself refuses to change, delete or truncate an event.

The setting ``aiscale.allow_truncate`` let a session truncate; 0012 took that away.
"""

import django.utils.timezone
from django.db import migrations, models

TRIGGERS = """
CREATE FUNCTION accounts_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' AND coalesce(current_setting('aiscale.allow_truncate', true), '') = 'on' THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION '% is append-only: % is refused.', TG_TABLE_NAME, TG_OP USING ERRCODE = 'restrict_violation';
END $$;
CREATE TRIGGER accounts_auditevent_no_change BEFORE UPDATE OR DELETE ON accounts_auditevent
    FOR EACH ROW EXECUTE FUNCTION accounts_refuse_change();
CREATE TRIGGER accounts_auditevent_no_truncate BEFORE TRUNCATE ON accounts_auditevent
    FOR EACH STATEMENT EXECUTE FUNCTION accounts_refuse_change();
"""

REVERSE = """
DROP TRIGGER accounts_auditevent_no_change ON accounts_auditevent;
DROP TRIGGER accounts_auditevent_no_truncate ON accounts_auditevent;
DROP FUNCTION accounts_refuse_change();
"""


class Migration(migrations.Migration):
    dependencies = [("accounts", "0001_accounts")]

    operations = [
        migrations.CreateModel(
            name="AuditEvent",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("public_id", models.CharField(editable=False, max_length=40, unique=True)),
                ("at", models.DateTimeField(default=django.utils.timezone.now)),
                (
                    "actor_kind",
                    models.CharField(
                        choices=[("user", "User"), ("command", "Command"), ("system", "System"), ("budget", "Budget")],
                        max_length=16,
                    ),
                ),
                ("actor", models.CharField(max_length=254)),
                ("actor_id", models.CharField(blank=True, max_length=40)),
                ("address", models.GenericIPAddressField(blank=True, null=True, verbose_name="IP address")),
                ("action", models.CharField(max_length=64)),
                ("target", models.CharField(max_length=200)),
                ("organization_id", models.CharField(blank=True, max_length=40)),
                ("reason", models.CharField(blank=True, max_length=500)),
                ("details", models.JSONField(blank=True, default=dict)),
            ],
            options={
                "ordering": ["-at", "-id"],
                "indexes": [
                    models.Index(fields=["-at"], name="audit_by_time"),
                    models.Index(fields=["organization_id", "-at"], name="audit_by_organization"),
                    models.Index(fields=["target", "-at"], name="audit_by_target"),
                ],
            },
        ),
        migrations.RunSQL(TRIGGERS, REVERSE),
    ]
