"""Read a decoder from the folder of an ONNX export: ``config.json``, ``tokenizer.json`` and the graph with its weights."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.artifacts.decoder import DecoderShape
from workers.artifacts.errors import ConversionError
from workers.artifacts.onnx_tensors import OnnxTensors
from workers.artifacts.safetensors_decoder import read_frequency_divisors, translate

_PACKED = ".self_attn.qkv_proj."


class OnnxWeights:
    """Implement `decoder.Weights`."""

    def __init__(self, path: Path, config: dict[str, Any], shape: DecoderShape) -> None:
        """I/O: reads the graph. Raises: ConversionError."""
        self._tensors = OnnxTensors(path)
        self._divisors = read_frequency_divisors(config, shape)
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        parts = {"q": slice(0, query), "k": slice(query, query + key), "v": slice(query + key, query + 2 * key)}
        self._places: dict[str, tuple[str, slice | None]] = {}
        for name in self._tensors.names():
            if _PACKED in name:
                for part, rows in parts.items():
                    self._places[translate(name.replace("qkv_proj", f"{part}_proj"))] = (name, rows)
            else:
                self._places[translate(name)] = (name, None)
        if config.get("tie_word_embeddings") and "token_embd.weight" in self._places:
            self._places.pop("output.weight", None)

    def names(self) -> set[str]:
        return set(self._places) | (set() if self._divisors is None else {"rope_freqs.weight"})

    def read(self, name: str) -> NDArray[np.float32]:
        if name == "rope_freqs.weight" and self._divisors is not None:
            return self._divisors
        theirs, rows = self._places[name]
        value = self._tensors.read(theirs)
        if rows is None:
            return value
        if len(value) < rows.stop:
            raise ConversionError(f"tensor {theirs[:100]} has {len(value)} rows, less than its heads take")
        return value[rows]
