"""Find the keys that were revoked a moment ago."""

from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    atomic = False
    dependencies = [("accounts", "0004_several_members")]

    operations = [
        AddIndexConcurrently(
            model_name="apikey",
            index=models.Index(fields=["revoked_at"], name="key_revoked", condition=models.Q(("revoked_at__isnull", False))),
        ),
    ]
