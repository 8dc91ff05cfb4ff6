import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('inference', '0004_upstreams'),
    ]

    operations = [
        migrations.AddField(
            model_name='model',
            name='previous_version',
            field=models.CharField(blank=True, db_default='', editable=False, max_length=64),
        ),
        migrations.CreateModel(
            name='ModelVersion',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('public_id', models.CharField(editable=False, max_length=40, unique=True)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('updated_at', models.DateTimeField(auto_now=True)),
                ('version', models.CharField(max_length=64)),
                ('precision', models.CharField(max_length=8)),
                ('batch_invariant', models.BooleanField(default=False, verbose_name='batch-invariant')),
                ('context_tokens', models.PositiveIntegerField(verbose_name='context, tokens')),
                ('size_bytes', models.PositiveBigIntegerField(default=0)),
                ('source', models.CharField(blank=True, max_length=300)),
                ('license', models.CharField(blank=True, max_length=100)),
                ('takes_chats', models.BooleanField(default=False)),
                ('weight', models.PositiveSmallIntegerField(default=0, verbose_name='of 100 requests')),
                ('canary_since', models.DateTimeField(blank=True, null=True)),
                ('rolled_back_at', models.DateTimeField(blank=True, null=True)),
                ('rolled_back_because', models.CharField(blank=True, max_length=300)),
                ('alert_due', models.BooleanField(default=False)),
                ('model', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='versions', to='inference.model')),
            ],
            options={
                'constraints': [models.UniqueConstraint(fields=('model', 'version'), name='model_version_is_one'), models.CheckConstraint(condition=models.Q(('weight__lte', 99)), name='model_version_weight_is_possible')],
            },
        ),
    ]
