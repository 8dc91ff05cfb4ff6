"""Let organizations have several members: invitations, the role billing, deletion, and never an organization without an owner.

The trigger looks at commit, under a lock on the organization: of two owners who leave at once, the second is refused, whoever asks
(the pages, the admin site or a shell).
"""

import django.db.models.deletion
import django.db.models.functions.text
from django.conf import settings
from django.db import migrations, models

KEEP_AN_OWNER = """
CREATE FUNCTION accounts_keep_an_owner() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.role <> 'owner' THEN
        RETURN NULL;
    END IF;
    PERFORM 1 FROM accounts_organization WHERE id = OLD.organization_id AND deleted_at IS NULL FOR NO KEY UPDATE;
    IF FOUND AND NOT EXISTS (
        SELECT 1 FROM accounts_membership WHERE organization_id = OLD.organization_id AND role = 'owner'
    ) THEN
        RAISE EXCEPTION 'organization % needs an owner', OLD.organization_id
            USING ERRCODE = 'integrity_constraint_violation', CONSTRAINT = 'organization_has_an_owner';
    END IF;
    RETURN NULL;
END $$;

CREATE CONSTRAINT TRIGGER accounts_membership_keeps_an_owner AFTER UPDATE OR DELETE ON accounts_membership
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION accounts_keep_an_owner();
"""

REVERSE = """
DROP TRIGGER accounts_membership_keeps_an_owner ON accounts_membership;
DROP FUNCTION accounts_keep_an_owner();
"""


class Migration(migrations.Migration):

    dependencies = [
        ('accounts', '0003_limits'),
    ]

    operations = [
        migrations.AlterField(
            model_name='auditevent',
            name='actor_kind',
            field=models.CharField(choices=[('user', 'User'), ('command', 'Command'), ('system', 'System'), ('budget', 'Budget'), ('link', 'Link')], max_length=16),
        ),
        migrations.AddField(
            model_name='organization',
            name='deleted_at',
            field=models.DateTimeField(blank=True, editable=False, null=True),
        ),
        migrations.AlterField(
            model_name='membership',
            name='role',
            field=models.CharField(choices=[('owner', 'Owner'), ('admin', 'Admin'), ('member', 'Member'), ('billing', 'Billing')], default='member', max_length=16),
        ),
        migrations.CreateModel(
            name='Invitation',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('public_id', models.CharField(editable=False, max_length=40, unique=True)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('updated_at', models.DateTimeField(auto_now=True)),
                ('email', models.EmailField(help_text='In lower case.', max_length=254, verbose_name='e-mail address')),
                ('role', models.CharField(choices=[('owner', 'Owner'), ('admin', 'Admin'), ('member', 'Member'), ('billing', 'Billing')], default='member', max_length=16)),
                ('state', models.CharField(choices=[('pending', 'Pending'), ('accepted', 'Accepted'), ('declined', 'Declined'), ('revoked', 'Revoked')], default='pending', max_length=16)),
                ('expires_at', models.DateTimeField()),
                ('send_at', models.DateTimeField(blank=True, null=True)),
                ('send_attempts', models.PositiveSmallIntegerField(default=0)),
                ('ended_at', models.DateTimeField(blank=True, null=True)),
                ('invited_by', models.ForeignKey(null=True, on_delete=django.db.models.deletion.SET_NULL, related_name='invitations_made', to=settings.AUTH_USER_MODEL)),
                ('organization', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='invitations', to='accounts.organization')),
            ],
            options={
                'indexes': [models.Index(condition=models.Q(('state', 'pending')), fields=['email'], name='invitation_by_email'), models.Index(condition=models.Q(('send_at__isnull', False)), fields=['send_at'], name='invitation_due')],
                'constraints': [models.UniqueConstraint(condition=models.Q(('state', 'pending')), fields=('organization', 'email'), name='invitation_pending_once'), models.CheckConstraint(condition=models.Q(('email', django.db.models.functions.text.Lower('email'))), name='invitation_in_lower_case')],
            },
        ),
        migrations.RunSQL(KEEP_AN_OWNER, REVERSE),
    ]
