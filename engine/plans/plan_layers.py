"""What a compiler made of a graph: the layers of a plan, and which products run in FP8.

Knows nothing of how a plan is compiled; reads what the library tells of it.

TensorRT's inspector tells of a plan that can be loaded here. Of a plan built for another card the
verbose log of the build tells the same, in lines of

    Name: N, LayerType: gemm, Inputs: [ { Name: X, Dimensions: [-1,768], ..., Datatype: FP8, ...
    }], Constants: [...], Outputs: [...], TacticName: T, StreamId: 0, Metadata: [ONNX Layer: M]...
"""

import dataclasses
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

DType = Literal["fp8", "fp16", "bf16", "fp32", "int64", "int32", "int8", "uint8", "bool", "other"]

# How TensorRT 10, 11 and RTX spell them, alone (`Half`) or in the name of a format (`Row major
# linear FP16 format`). The first that is found counts, so that BFloat16 is no Float.
_DTYPES: tuple[tuple[str, DType], ...] = (
    (r"FP8|E4M3", "fp8"),
    (r"BF16|BFloat16", "bf16"),
    (r"FP16|Half", "fp16"),
    (r"FP32|Float", "fp32"),
    (r"Int64", "int64"),
    (r"Int32", "int32"),
    (r"UInt8", "uint8"),
    (r"Int8", "int8"),
    (r"Bool", "bool"),
)
_LINE = re.compile(
    r"^\s*Name: (?P<name>.*?), LayerType: (?P<type>\w*), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], "
    r"TacticName: (?P<tactic>.*?), StreamId: .*?Metadata: ?(?P<metadata>.*)$",
    re.MULTILINE,
)
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<dimensions>[-\d,]*)\], .*?Datatype: (?P<dtype>\w+)"
)
_ONNX_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
_ACTIVATION_BYTES = re.compile(r"Total Activation Memory: (\d+) bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTensor:
    """What a layer reads or writes."""

    name: str
    """Given by the compiler."""
    dtype: DType
    """As stored."""
    dimensions: tuple[int, ...]
    """-1 where it depends on the input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One kernel of a plan, or one step between kernels."""

    name: str
    """Given by the compiler."""
    type: str
    """`gemm`, `kgen` (a generated kernel), `correlation` (a convolution), ..."""
    inputs: tuple[LayerTensor, ...]
    """Activations that it reads."""
    outputs: tuple[LayerTensor, ...]
    """Activations that it writes."""
    constants: tuple[LayerTensor, ...]
    """Weights that it reads."""
    tactic: str
    """Name of the kernel, where it was chosen at build time."""
    onnx_layers: tuple[str, ...]
    """Nodes of the graph that it does, or a part of them."""


def layers_from_log(messages: Iterable[str]) -> list[Layer]:
    """Read the layers from the messages of a build with detailed profiling verbosity."""
    return [
        Layer(
            name=found["name"],
            type=found["type"],
            inputs=_tensors_of_line(found["inputs"]),
            outputs=_tensors_of_line(found["outputs"]),
            constants=_tensors_of_line(found["constants"]),
            tactic=found["tactic"],
            onnx_layers=tuple(_ONNX_NODE.findall(found["metadata"])),
        )
        for message in messages
        for found in _LINE.finditer(message)
    ]


def activation_bytes_from_log(messages: Iterable[str]) -> int | None:
    """Read from a build's messages what a plan's activations take, in bytes."""
    found = [match for message in messages for match in _ACTIVATION_BYTES.findall(message)]
    return int(found[-1]) if found else None


def layers_from_inspector(information: str) -> list[Layer]:
    """Read the layers from the JSON of an engine inspector (TensorRT 10 or 11, or RTX)."""
    return [
        Layer(
            name=record["Name"],
            type=record["LayerType"],
            inputs=_tensors_of_record(record["Inputs"]),
            outputs=_tensors_of_record(record["Outputs"]),
            constants=_tensors_of_record(record.get("Constants", [])),
            tactic=record.get("TacticName", ""),
            onnx_layers=tuple(_ONNX_NODE.findall(record.get("Metadata", ""))),
        )
        # Not strict: metadata of layers holds control characters as they are.
        for record in json.loads(information, strict=False)["Layers"]
    ]


def layers_json(layers: Iterable[Layer]) -> str:
    """The layers as a JSON list, with the fields of `Layer`."""
    return json.dumps([dataclasses.asdict(layer) for layer in layers], indent=1) + "\n"


def fallbacks(layers: Iterable[Layer], *, fp8_products: Collection[str]) -> tuple[str, ...]:
    """The products that the graph wants in FP8 and the plan multiplies in 16 bit.

    Args:
        layers: Of the plan.
        fp8_products: ONNX MatMul nodes whose both inputs are dequantized from FP8.

    Returns:
        Names of the nodes that no layer multiplies from FP8, sorted.
    """
    in_fp8 = {
        node
        for layer in layers
        if _multiplies_fp8(layer, fp8_products)
        for node in layer.onnx_layers
    }
    return tuple(sorted(set(fp8_products) - in_fp8))


def _multiplies_fp8(layer: Layer, fp8_products: Collection[str]) -> bool:
    """Whether a layer reads FP8 for all of its products.

    A node also stands in the layers that pad an operand or read the product, which have one FP8
    tensor or none. A product of weights reads two, however many products were merged into it; a
    chain of products within one kernel (attention) reads one more than it has products.
    """
    num_products = sum(node in fp8_products for node in layer.onnx_layers)
    fp8_inputs = sum(tensor.dtype == "fp8" for tensor in layer.inputs)
    fp8_constants = sum(tensor.dtype == "fp8" for tensor in layer.constants)
    if layer.type == "gemm" or fp8_constants:
        return fp8_inputs + fp8_constants >= 2
    return num_products > 0 and fp8_inputs > num_products


def _tensors_of_line(text: str) -> tuple[LayerTensor, ...]:
    return tuple(
        LayerTensor(
            name=found["name"],
            dtype=_dtype(found["dtype"]),
            dimensions=tuple(int(size) for size in found["dimensions"].split(",") if size),
        )
        for found in _TENSOR.finditer(text)
    )


def _tensors_of_record(records: Iterable[dict[str, Any]]) -> tuple[LayerTensor, ...]:
    # TensorRT 10 has one field for format and type, TensorRT 11 and RTX one for each.
    return tuple(
        LayerTensor(
            name=record["Name"],
            dtype=_dtype(
                record.get("Datatype") or record.get("DataType") or record["Format/Datatype"]
            ),
            dimensions=tuple(record.get("Dimensions", ())),
        )
        for record in records
    )


def _dtype(text: str) -> DType:
    for pattern, dtype in _DTYPES:
        if re.search(pattern, text, re.IGNORECASE):
            return dtype
    return "other"
