import subprocess
import sys
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from aiscale.wire.manifest import Manifest, list_manifests
from apps.inference import entries, prompts


class Command(BaseCommand):
    help = (
        "Take in a model: a GGUF file (llama, qwen2, qwen3), a Hugging Face folder of safetensors or of an ONNX export (also encoders "
        "and classifiers of texts: BERT, RoBERTa and its kin, DistilBERT), or a folder that aiscale converted elsewhere. Converts it, "
        "measures what that cost, and enters it into the catalog."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("source")
        parser.add_argument("--name", required=True, help="what requests call it: small letters, digits, - and _")
        parser.add_argument("--quantize", choices=("int4", "int8", "fp16", "fp32"), help="default: what runs best here")
        parser.add_argument("--license", default="unknown")

    def handle(self, *args: Any, **options: Any) -> None:
        before = {(manifest.name, manifest.version) for _, manifest in list_manifests(settings.ENV.models_dir)}
        self._convert(options)
        found = [
            manifest for _, manifest in list_manifests(settings.ENV.models_dir) if manifest.name == options["name"]
        ]
        new = [manifest for manifest in found if (manifest.name, manifest.version) not in before]
        manifest = (new or found)[0]
        self.stdout.write(f"catalog: {entries.enter(manifest, switch=False)}")
        self._tell_chats(manifest)

    def _convert(self, options: dict[str, Any]) -> None:
        """The web never loads a model: a process of the workers' side converts it, and says on this terminal what comes of it."""
        command = [sys.executable, "-m", "workers.artifacts", "import", options["source"], "--name", options["name"]]
        command += ["--license", options["license"], "--models-dir", str(settings.ENV.models_dir)]
        if options["quantize"]:
            command += ["--quantize", options["quantize"]]
        done = subprocess.run(command, cwd=settings.BASE_DIR, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CommandError((done.stderr.strip().splitlines() or ["the conversion failed"])[-1])
        self.stdout.write(done.stdout.rstrip())

    def _tell_chats(self, manifest: Manifest) -> None:
        if manifest.kind == "generate" and (problem := prompts.find_template_problem(manifest.name, manifest.version)):
            self.stdout.write(f"It cannot take chats ({problem}): it serves /v1/completions alone.")
