"""Find a request by its id among millions. Built without locking the table."""

from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    atomic = False
    dependencies = [("spend", "0013_refusals")]

    operations = [
        AddIndexConcurrently("usagerecord", models.Index(fields=["request_id"], name="usage_by_request")),
    ]
