"""Choose where ONNX Runtime computes: an NVIDIA GPU when there is one, else the CPU."""

from collections.abc import Sequence

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


class UnknownProvider(ValueError):
    """An execution provider was asked for that this machine's ONNX Runtime does not have."""


def choose_providers(requested: str | None, available: Sequence[str]) -> list[str]:
    """Return the execution providers to try, best first, always ending with the CPU's.

    ``requested`` is a comma-separated list of names, or None or empty to choose. ``available`` is what
    `onnxruntime.get_available_providers()` says. Raises: UnknownProvider.
    """
    if not requested or not requested.strip():
        return [CUDA, CPU] if CUDA in available else [CPU]
    names = [name.strip() for name in requested.split(",") if name.strip()]
    missing = [name for name in names if name not in available]
    if missing or not names:
        raise UnknownProvider(
            f"this machine's ONNX Runtime has no {', '.join(missing) or 'provider named ' + repr(requested)}; "
            f"it has {', '.join(available)}. Name one of these, or leave the setting empty to choose by itself"
            + ("; for NVIDIA GPUs install aiscale[gpu]" if CUDA in missing else "")
        )
    names = list(dict.fromkeys(names))
    return names if CPU in names else [*names, CPU]


def providers_for(precision: str, providers: Sequence[str]) -> list[str]:
    """Return those of ``providers`` that run a generator of this precision well.

    The CUDA attention kernel takes 16-bit floats alone: another graph would cross to the CPU and back in every layer, so it
    stays on the CPU altogether.
    """
    if precision == "fp16":
        return list(providers)
    return [name for name in providers if name != CUDA] or [CPU]
