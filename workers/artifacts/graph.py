"""Write an ONNX graph node by node, for ONNX Runtime's own fused operators."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from workers.artifacts.errors import ConversionError
from workers.artifacts.weights import WeightFile

MICROSOFT = "com.microsoft"
_OPSET = 17
_IR_VERSION = 8
_PROTOBUF_LIMIT_BYTES = 2**31 - 2**20

FLOAT = TensorProto.FLOAT
FLOAT16 = TensorProto.FLOAT16
INT64 = TensorProto.INT64
INT32 = TensorProto.INT32
UINT8 = TensorProto.UINT8

Dimension = str | int


class GraphWriter:
    """Collect nodes and constants; each method returns the name of what it made."""

    def __init__(self, name: str, opset: int = _OPSET) -> None:
        """``opset``: the version of ONNX's own operators that the nodes are written in."""
        self._name, self._opset = name, opset
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._count = 0

    def input(self, name: str, dtype: int, shape: Sequence[Dimension]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[Dimension]) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Store ``value`` once under ``name``; the same name again means the same constant."""
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def node(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | None = None,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node; return its first output's name, made up when ``outputs`` is not given."""
        self._count += 1
        names = list(outputs) if outputs is not None else [f"{kind}_{self._count}"]
        self._nodes.append(
            helper.make_node(kind, list(inputs), names, name=f"{kind}#{self._count}", domain=domain, **attributes)
        )
        return names[0]

    def save(self, path: Path, weights: WeightFile | None = None) -> None:
        """Write the graph as one file, or with its large constants in ``weights``, which several graphs may share.

        I/O: writes ``path``. Raises: ConversionError when one file would be larger than protobuf can hold (2 GiB).
        """
        if weights is not None:
            for tensor in self._constants.values():
                weights.move(tensor)
        graph = helper.make_graph(self._nodes, self._name, self._inputs, self._outputs, list(self._constants.values()))
        opsets = [helper.make_opsetid("", self._opset), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="aiscale")
        size_bytes = model.ByteSize()
        if size_bytes > _PROTOBUF_LIMIT_BYTES:
            raise ConversionError(
                f"the graph of {self._name} would be {size_bytes / 1e9:.1f} GB, more than one ONNX file holds (2 GB); "
                "convert with precision int4, or take a smaller model"
            )
        onnx.save_model(model, str(path))
