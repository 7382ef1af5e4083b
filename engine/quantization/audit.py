"""Reads an exported graph back: which of its products are FP8, and whether just those that should.

Knows nothing of who made the graph or compiles it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from engine.errors import QuantizationError
from engine.quantization.units import Unit

PRODUCTS = ("MatMul", "Gemm", "Conv")
FP8 = onnx.TensorProto.FLOAT8E4M3FN


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """The products of one tower's graph, by the name of their ONNX node."""

    fp8: tuple[str, ...]
    """Both operands are FP8."""
    not_fp8: tuple[str, ...]
    """Neither operand is."""
    num_quantize: int
    """QuantizeLinear nodes: one for each quantized activation, however many products share it."""
    num_weights: int
    """Weights stored as FP8."""
    faults: tuple[str, ...]
    """What differs from what was asked for; empty in an engine that may be used."""


def audit_graph(path: Path, *, units: Sequence[Unit]) -> Audit:
    """Compare an exported graph with the units that were to be quantized.

    Args:
        path: ONNX file.
        units: Those of its tower that are quantized; every product outside them must not be.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    made_by = {output: node for node in graph.node for output in node.output}
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in PRODUCTS]
    operands = {
        node.name: [_is_dequantized(name, made_by) for name in node.input[:2]] for node in products
    }
    fp8 = {name for name, dequantized in operands.items() if all(dequantized)}
    half_done = {name for name, dequantized in operands.items() if any(dequantized)} - fp8
    expected = {name for unit in units for name in _products_of(unit, operands)}
    points = {point for unit in units for point in unit.points}
    layers = {layer for unit in units for layer in unit.layers}
    quantizing = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    weights = [
        node
        for node in graph.node
        if node.op_type == "DequantizeLinear" and stored.get(node.input[0]) == FP8
    ]
    faults = [f"{name}: only one operand is FP8" for name in sorted(half_done)]
    faults += [f"{name}: should be FP8 and is not" for name in sorted(expected - fp8 - half_done)]
    faults += [f"{name}: is FP8 and should not be" for name in sorted(fp8 - expected)]
    faults += _stray_uses(graph)
    types = {**stored, **_constant_types(graph)}
    faults += [
        f"{node.name}: quantizes to another type than FP8 E4M3"
        for node in quantizing
        if types.get(node.input[2] if len(node.input) > 2 else "") != FP8
    ]
    if len(quantizing) != len(points):
        faults.append(f"{len(quantizing)} activations are quantized, {len(points)} should be")
    if len(weights) != len(layers):
        faults.append(f"{len(weights)} weights are FP8, {len(layers)} should be")
    if len(expected) != len(layers) + 2 * sum(not unit.layers for unit in units):
        faults.append(f"only {len(expected)} products were found for the units to quantize")
    return Audit(
        fp8=tuple(sorted(fp8)),
        not_fp8=tuple(sorted(set(operands) - fp8 - half_done)),
        num_quantize=len(quantizing),
        num_weights=len(weights),
        faults=tuple(faults),
    )


def check(audit: Audit, *, path: Path) -> None:
    """Raise QuantizationError if the graph is not what was asked for."""
    if audit.faults:
        shown = "; ".join(audit.faults[:5])
        more = f" and {len(audit.faults) - 5} more" if len(audit.faults) > 5 else ""
        raise QuantizationError(
            f"{path.name}: the exported graph is not the quantized tower: {shown}{more}. This is "
            "a fault of Clipmill or of the installed torch: compare its version with "
            "constraints.txt"
        )


def _is_dequantized(name: str, made_by: dict[str, onnx.NodeProto]) -> bool:
    node = made_by.get(name)
    return node is not None and node.op_type == "DequantizeLinear"


def _constant_types(graph: onnx.GraphProto) -> dict[str, int]:
    """Element types of Constant nodes; a zero point has that of what it quantizes to."""
    return {
        node.output[0]: attribute.t.data_type
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }


def _products_of(unit: Unit, operands: Collection[str]) -> list[str]:
    """The nodes of a unit: one for each layer, or the two within attention."""
    scopes = [_scope(layer) for layer in unit.layers] or [_scope(unit.parent)]
    return [name for name in operands if name.rpartition("/")[0] in scopes]


def _scope(module: str) -> str:
    """`backbone.blocks.0.attention` -> `/backbone/blocks.0/attention`, as the exporter says it."""
    parts: list[str] = []
    for part in module.split("."):
        if part.isdigit():
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return "/" + "/".join(parts)


def _stray_uses(graph: onnx.GraphProto) -> list[str]:
    """Dequantized values that anything but a product reads: they would be rounded for nothing."""
    dequantized = {
        output: node.name
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        for output in node.output
    }
    return [
        f"{dequantized[name]}: read by {node.op_type} {node.name}, which is no product"
        for node in graph.node
        if node.op_type not in PRODUCTS
        for name in node.input
        if name in dequantized
    ]
