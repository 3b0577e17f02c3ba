"""An ONNX graph under construction: nodes in order, small constants inside, weights in a file beside it.

Weights go to the file as they come, so that no more than one is in memory; two graphs that share a
WeightFile share the weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
MICROSOFT = "com.microsoft"
ALIGNMENT = 4096  # of a weight in its file, so that it can be mapped
IR_VERSION = 10  # of onnx 1.16; the first with 4-bit integers


class WeightFile:
    """External data that graphs refer to by file name, offset and length."""

    def __init__(self, path: Path) -> None:
        self._name, self._file = path.name, path.open("wb")
        self.tensors: dict[str, TensorProto] = {}

    def add(self, name: str, array: Array, kind: int | None = None, shape: Sequence[int] = ()) -> str:
        """Appends a tensor unless it is there. kind, shape: where numpy has no such type, and `array` holds
        its bytes."""
        if name in self.tensors:
            return name
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        data = np.ascontiguousarray(array)
        self._file.write(data.data)
        kind = helper.np_dtype_to_tensor_dtype(data.dtype) if kind is None else kind
        tensor = TensorProto(name=name, data_type=kind, dims=tuple(shape) or data.shape)
        tensor.data_location = TensorProto.EXTERNAL
        where = {"location": self._name, "offset": str(offset), "length": str(data.nbytes)}
        tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in where.items())
        self.tensors[name] = tensor
        return name

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class Graph:
    """Nodes and what they need; names of values are made up, but for those that are given."""

    def __init__(self, weights: WeightFile, opset: int) -> None:
        self.weights, self.opset = weights, opset
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}
        self._used: dict[str, TensorProto] = {}
        self._count = 0

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """A small constant, stored in the graph itself, once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(array, f"constant_{len(self._constants)}")
        return self._constants[key].name

    def integers(self, *values: int) -> str:
        """A vector of int64, as shapes and axes are."""
        return self.constant(values, np.int64)

    def weight(self, name: str, array: Array, kind: int | None = None, shape: Sequence[int] = ()) -> str:
        """A weight in the file; see WeightFile.add."""
        self.weights.add(name, array, kind, shape)
        return self.stored(name)

    def stored(self, name: str) -> str:
        """A weight that is in the file already."""
        self._used[name] = self.weights.tensors[name]
        return name

    def op(
        self, kind: str, *inputs: str, outputs: int | Sequence[str] = 1, domain: str = "", **attributes: Any
    ) -> Any:
        """Adds a node; the name of its output, or a list of several. "" is an input left out.

        outputs: how many, or their names.
        """
        self._count += 1
        label = f"{kind}_{self._count}"
        names = [f"{label}_{n}" for n in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self._nodes.append(helper.make_node(kind, inputs, names, label, domain=domain, **attributes))
        return names[0] if len(names) == 1 else names

    def microsoft(self, kind: str, *inputs: str, outputs: int | Sequence[str] = 1, **attributes: Any) -> Any:
        """An operator of ONNX Runtime's own."""
        return self.op(kind, *inputs, outputs=outputs, domain=MICROSOFT, **attributes)

    def model(self, name: str, producer_version: str) -> onnx.ModelProto:
        nodes, read = self._needed()
        initializers = [t for t in (*self._constants.values(), *self._used.values()) if t.name in read]
        graph = helper.make_graph(nodes, name, self.inputs, self.outputs, initializers)
        opsets = [helper.make_opsetid("", self.opset)]
        if any(node.domain == MICROSOFT for node in nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="gristmill",
            producer_version=producer_version,
        )  # fmt: skip

    def _needed(self) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes that an output comes from, in order, and the names that they read.

        Outputs of ONNX Runtime's own operators that nothing reads are left out, and not computed then.
        """
        nodes: list[onnx.NodeProto] = []
        read = {output.name for output in self.outputs}
        for node in reversed(self._nodes):
            if not read.isdisjoint(node.output):
                nodes.append(node)
                if node.domain == MICROSOFT:
                    node.output[:] = [name if name in read else "" for name in node.output]
                read.update(name for name in node.input if name)
        return nodes[::-1], read
