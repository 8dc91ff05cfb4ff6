from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("gateway", "0005_size_of_batches")]

    operations = [
        migrations.AddField("batch", "model", models.CharField(max_length=100, blank=True, default="", db_default="")),
        migrations.AddField("batch", "input_tokens", models.BigIntegerField(null=True)),
        migrations.AddField("batch", "cached_tokens", models.BigIntegerField(null=True)),
        migrations.AddField("batch", "output_tokens", models.BigIntegerField(null=True)),
    ]
