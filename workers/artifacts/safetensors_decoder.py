"""Read a decoder's dimensions and weights from a Hugging Face folder: ``config.json`` and safetensors. Pickles are never opened."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from workers.artifacts import decoder
from workers.artifacts.decoder import DecoderShape
from workers.artifacts.encoder_families import FAMILIES
from workers.artifacts.errors import ConversionError

KINDS = ("llama", "mistral", "qwen2", "qwen3")
CONFIG_FILE = "config.json"
_JSON_LIMIT_BYTES = 64 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def list_files(folder: Path) -> list[Path]:
    """List the folder's safetensors files. I/O: lists the folder. Raises: ConversionError when there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise ConversionError(
            f"{folder.name} holds its weights as pickles, which can run code; convert them to safetensors first"
        )
    raise ConversionError(f"{folder.name} has no *.safetensors file")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object. I/O: one file. Raises: ConversionError."""
    try:
        if path.stat().st_size > _JSON_LIMIT_BYTES:
            raise ConversionError(f"{path.name} is larger than {_JSON_LIMIT_BYTES >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path.parent.name} has no {path.name}") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path.name} is not JSON: {str(error)[:100]}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path.name} does not hold a JSON object")
    return value


def read_shape(config: dict[str, Any]) -> DecoderShape:
    """Read the dimensions. Raises: ConversionError for another kind of model or a variant that the graph does not compute."""
    kind = config.get("model_type")
    if kind not in KINDS:
        raise ConversionError(
            f"{CONFIG_FILE} describes a {str(kind)[:40]!r} model; of decoders, {', '.join(KINDS)} are converted, "
            f"and of encoders {', '.join(FAMILIES)}"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ConversionError(f"the model's activation is {config['hidden_act']}; only silu is converted")
    if config.get("sliding_window") and (kind == "mistral" or config.get("use_sliding_window")):
        raise ConversionError("the model attends through a sliding window, which the converter does not compute")
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return DecoderShape(
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            ffn=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab_size=int(config["vocab_size"]),
            context_tokens=min(int(config["max_position_embeddings"]), decoder.MAX_CONTEXT_TOKENS),
            rope_base=float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10_000.0),
            norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ConversionError(f"{CONFIG_FILE} lacks a dimension or holds one that is no number: {error!r}") from error


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return found if isinstance(found, dict) else {}


def read_frequency_divisors(config: dict[str, Any], shape: DecoderShape) -> NDArray[np.float32] | None:
    """Return by what each rotation is slowed down, ``[head_dim / 2]``; None for plain rotations. Raises: ConversionError."""
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    half = shape.head_dim // 2
    try:
        if kind == "default":
            return None
        factor = float(rope["factor"])
        if kind == "linear":
            return np.full(half, factor, np.float32)
        if kind == "llama3":
            low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
            lengths = 2 * np.pi * shape.rope_base ** (np.arange(half) / half)
            turns = float(rope["original_max_position_embeddings"]) / lengths
            smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return np.asarray(1 / ((1 - smooth) / factor + smooth), np.float32)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConversionError(f"{CONFIG_FILE} describes its rope scaling badly: {error!r}") from error
    raise ConversionError(f"the model uses rope scaling {str(kind)[:40]!r}, which the converter does not compute")


class SafetensorsWeights:
    """Implement `decoder.Weights`. Headers are checked by the safetensors library; the values are mapped."""

    def __init__(self, folder: Path, config: dict[str, Any], shape: DecoderShape) -> None:
        """I/O: reads the files' headers. Raises: ConversionError."""
        self._divisors = read_frequency_divisors(config, shape)
        self._places: dict[str, tuple[Path, str]] = {}
        for path in list_files(folder):
            try:
                with safe_open(str(path), "np") as file:
                    names = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise ConversionError(
                    f"{path.name} is not a whole safetensors file ({str(error)[:150]}); download it again"
                ) from error
            for name in names:
                ours = translate(name)
                if ours in self._places:
                    raise ConversionError(f"the folder holds {name[:100]} twice")
                self._places[ours] = (path, name)
        self._places = {ours: place for ours, place in self._places.items() if not ours.endswith("rotary_emb.inv_freq")}
        if config.get("tie_word_embeddings"):
            self._places.pop("output.weight", None)

    def names(self) -> set[str]:
        return set(self._places) | (set() if self._divisors is None else {"rope_freqs.weight"})

    def read(self, name: str) -> NDArray[np.float32]:
        if name == "rope_freqs.weight" and self._divisors is not None:
            return self._divisors
        path, theirs = self._places[name]
        try:
            with safe_open(str(path), "np") as file:
                if file.get_slice(theirs).get_dtype() == "BF16":
                    return _read_bfloat16(path, theirs)
                value = file.get_tensor(theirs)
        except (SafetensorError, OSError, TypeError, ValueError, KeyError) as error:
            raise ConversionError(f"tensor {theirs[:100]} cannot be read: {str(error)[:150]}") from error
        if value.dtype not in (np.float16, np.float32, np.float64):
            raise ConversionError(
                f"tensor {theirs[:100]} is stored as {value.dtype}; take a model that is not quantized"
            )
        return np.asarray(value, np.float32)


def _read_bfloat16(path: Path, name: str) -> NDArray[np.float32]:
    """Widen the upper halves of float32, which numpy has no type for. The header was checked by the library."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        start, end = entry["data_offsets"]
        file.seek(8 + length + start)
        halves = np.frombuffer(file.read(end - start), np.uint16)
    return (halves.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])


def translate(name: str) -> str:
    """Return GGUF's name of a tensor; one that is not known keeps its own."""
    found = _LAYER.fullmatch(name)
    if found and found[2] in _INNER:
        return f"blk.{found[1]}.{_INNER[found[2]]}.{found[3]}"
    return _OUTER.get(name, name)
