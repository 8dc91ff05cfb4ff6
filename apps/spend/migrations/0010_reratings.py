"""Keep the orders to charge past requests at other prices."""

from django.db import migrations, models

import aiscale.db


class Migration(migrations.Migration):
    dependencies = [("spend", "0009_usage_costs")]

    operations = [
        migrations.CreateModel(
            name="Rerating",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("public_id", models.CharField(editable=False, max_length=40, unique=True)),
                ("created_at", models.DateTimeField(auto_now_add=True)),
                ("updated_at", models.DateTimeField(auto_now=True)),
                ("model", models.CharField(max_length=128)),
                ("since", models.DateTimeField()),
                ("until", models.DateTimeField()),
                ("prompt_nanousd_per_token", aiscale.db.NanoUsdField()),
                ("cached_prompt_nanousd_per_token", aiscale.db.NanoUsdField()),
                ("completion_nanousd_per_token", aiscale.db.NanoUsdField()),
                ("request_nanousd", aiscale.db.NanoUsdField(default=0)),
                ("reason", models.CharField(max_length=300)),
                ("finished_at", models.DateTimeField(blank=True, null=True)),
            ],
            options={"abstract": False},
        ),
    ]
