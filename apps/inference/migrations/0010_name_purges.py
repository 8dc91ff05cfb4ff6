"""Call a generation of the cache what it is to those who read the admin."""

from django.db import migrations


class Migration(migrations.Migration):
    dependencies = [("inference", "0009_semantic_entries")]

    operations = [
        migrations.AlterModelOptions(
            name="cachegeneration",
            options={"verbose_name": "purge of known answers", "verbose_name_plural": "purges of known answers"},
        ),
    ]
