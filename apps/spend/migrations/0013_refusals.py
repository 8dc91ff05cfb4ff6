"""Keep a sample of refused requests, and count all of them."""

import django.db.models.functions.datetime
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("spend", "0012_webhook_rotation")]

    operations = [
        migrations.CreateModel(
            name="RefusedRequest",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("request_id", models.CharField(max_length=128, unique=True)),
                ("organization_id", models.CharField(blank=True, max_length=40)),
                ("user_id", models.CharField(blank=True, max_length=40)),
                ("key_id", models.CharField(blank=True, max_length=40)),
                ("plan", models.CharField(blank=True, max_length=64)),
                ("source", models.CharField(max_length=16)),
                ("model", models.CharField(blank=True, max_length=128)),
                ("code", models.CharField(max_length=64)),
                ("message", models.CharField(max_length=1000)),
                ("param", models.CharField(blank=True, max_length=64)),
                ("facts", models.JSONField(default=dict)),
                ("occurred_at", models.DateTimeField()),
                ("recorded_at", models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
            ],
            options={
                "indexes": [
                    models.Index(fields=["organization_id", "-occurred_at"], name="refused_by_organization"),
                    models.Index(fields=["occurred_at"], name="refused_by_time"),
                ]
            },
        ),
        migrations.CreateModel(
            name="RefusalCount",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("organization_id", models.CharField(blank=True, max_length=40)),
                ("code", models.CharField(max_length=64)),
                ("hour", models.DateTimeField()),
                ("count", models.BigIntegerField()),
            ],
            options={
                "indexes": [models.Index(fields=["hour"], name="refusal_count_by_hour")],
                "constraints": [
                    models.UniqueConstraint(fields=["organization_id", "hour", "code"], name="refusal_count_once")
                ],
            },
        ),
    ]
