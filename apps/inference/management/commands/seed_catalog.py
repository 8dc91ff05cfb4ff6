from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand

from aiscale.wire.manifest import Manifest, list_manifests
from apps.inference import entries


class Command(BaseCommand):
    help = "Enter the converted models into the catalog: new ones with prices to start with, known ones with their new version."

    def handle(self, *args: Any, **options: Any) -> None:
        newest: dict[str, Manifest] = {}
        for _, manifest in list_manifests(settings.ENV.models_dir):
            newest.setdefault(manifest.name, manifest)
        for manifest in newest.values():
            self.stdout.write(f"{manifest.name} {manifest.version}: {entries.enter(manifest, switch=True)}")
        if not newest:
            self.stderr.write(f"No converted model in {settings.ENV.models_dir}.")
