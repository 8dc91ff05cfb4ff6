"""Answer `python -m workers.artifacts ensure|list|verify|import`. Exit code 2 for a wrong call, 1 for a failure."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from aiscale import env
from aiscale.wire.manifest import Manifest, list_manifests
from workers.artifacts import build
from workers.artifacts.catalog import MODELS
from workers.artifacts.errors import ArtifactError, UnknownModel

PRECISIONS = ("int8", "int4", "fp16", "fp32")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        models_dir = Path(options.models_dir).expanduser().resolve() if options.models_dir else env.load().models_dir
        for name in getattr(options, "names", ()):
            build.find_model(name)
        options.run(models_dir, options)
    except (UnknownModel, env.BadSetting) as error:
        print(error, file=sys.stderr)
        return 2
    except ArtifactError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing half made is left behind", file=sys.stderr)
        return 130
    return 0


def _ensure(models_dir: Path, options: argparse.Namespace) -> None:
    for manifest in build.ensure(models_dir, options.names or None, options.precision):
        _show(models_dir / manifest.name / manifest.version, manifest)


def _list(models_dir: Path, options: argparse.Namespace) -> None:
    """Show what is on disk, then what could be."""
    found = list_manifests(models_dir)
    for directory, manifest in found:
        _show(directory, manifest)
    present = {manifest.name for _, manifest in found}
    for model in MODELS:
        if model.name not in present:
            print(f"{model.name}  not here yet; ensure fetches {model.download_bytes / 1e6:.0f} MB")


def _verify(models_dir: Path, options: argparse.Namespace) -> None:
    wanted = set(options.names)
    found = [directory for directory, manifest in list_manifests(models_dir) if not wanted or manifest.name in wanted]
    if not found:
        raise ArtifactError(f"there is nothing to verify in {models_dir}; run `python -m workers.artifacts ensure`")
    for directory in found:
        _show(directory, build.verify(directory), "ok")


def _import(models_dir: Path, options: argparse.Namespace) -> None:
    from workers.artifacts.imports import import_model

    made = import_model(models_dir, Path(options.source), options.name, options.quantize, options.license)
    _show(made.directory, made.manifest)
    for line in made.report:
        print(f"  {line}")


def _show(directory: Path, manifest: Manifest, note: str = "") -> None:
    size_bytes = sum(manifest.file_sizes_bytes.values())
    facts = f"{manifest.kind} {manifest.precision} {size_bytes / 1e6:.0f} MB"
    print("  ".join(part for part in (manifest.name, manifest.version, facts, str(directory), note) if part))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workers.artifacts", description="Keep converted models on disk.")
    commands = parser.add_subparsers(required=True, metavar="ensure|list|verify|import")
    for name, run, about in (
        ("ensure", _ensure, "fetch and convert what is missing"),
        ("list", _list, "show which models are here, and which could be"),
        ("verify", _verify, "hash every file and compare with the manifests"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("names", nargs="*", metavar="NAME", help="a model's name; none means all")
        command.add_argument("--models-dir", help="where models live; default: AISCALE_MODELS_DIR or .data/models")
        if name == "ensure":
            command.add_argument(
                "--precision",
                choices=PRECISIONS,
                help="of generators; default: int8; fp16 for GPUs",
            )
        command.set_defaults(run=run)
    about = "take in a GGUF file, a Hugging Face folder of safetensors, or a folder that aiscale converted"
    command = commands.add_parser("import", help=about, description=about)
    command.add_argument("source", metavar="SOURCE")
    command.add_argument("--name", required=True, help="what requests call it")
    command.add_argument(
        "--quantize", choices=PRECISIONS, help="default: int8; of encoders fp32 on CPUs without int8 units"
    )
    command.add_argument("--license", default="unknown")
    command.add_argument("--models-dir", help="where models live; default: AISCALE_MODELS_DIR or .data/models")
    command.set_defaults(run=_import)
    return parser


if __name__ == "__main__":
    sys.exit(main())
