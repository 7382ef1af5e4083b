"""Graphs of the demo towers read back, as they are exported and broken on purpose."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from engine.accuracy import row_cosines
from engine.errors import QuantizationError
from engine.quantization.audit import Audit, audit_graph, check
from engine.quantization.units import Unit, replace, units_of
from tests.quantized import (
    BLOCK_PRODUCTS,
    IN_16_BIT,
    MODALITIES,
    NUM_BLOCKS,
    QuantizedDemo,
    embed,
    export,
    in_16_bit,
    run_onnx,
)

QUERY = "/backbone/blocks.0/attention/query"
POINT = "/backbone/blocks.0/feed_forward/fc1_point"


@pytest.fixture(scope="module")
def graphs(
    quantized_demo: QuantizedDemo, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[tuple[str, str], Path]:
    """The quantized towers in both precisions, by modality and precision."""
    folder = tmp_path_factory.mktemp("graphs")
    towers = {name: result.tower for name, result in quantized_demo.quantized.items()}
    return {
        (name, precision): export(
            in_16_bit(tower) if precision == "float16" else tower,
            folder / f"{name}.{precision}.onnx",
        )
        for name, tower in towers.items()
        for precision in ("float16", "float32")
    }


@pytest.fixture(scope="module")
def units(quantized_demo: QuantizedDemo) -> list[Unit]:
    """Those of the image tower."""
    return units_of(quantized_demo.quantized["image"].tower)


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize("modality", MODALITIES)
def test_what_is_fp8_in_the_demo_and_what_is_not(
    quantized_demo: QuantizedDemo,
    graphs: Mapping[tuple[str, str], Path],
    modality: str,
    precision: str,
) -> None:
    tower = quantized_demo.quantized[modality].tower
    blocks = range(NUM_BLOCKS[modality])
    assert audit_graph(graphs[modality, precision], units=units_of(tower)) == Audit(
        fp8=tuple(
            f"/backbone/blocks.{number}/{product}"
            for number in blocks
            for product in BLOCK_PRODUCTS
        ),
        not_fp8=IN_16_BIT[modality],
        # Of a block: inputs of attention, of its four operands, its output's, fc1's and fc2's.
        num_quantize=8 * len(blocks),
        num_weights=6 * len(blocks),
        faults=(),
    )


def test_a_graph_without_fp8_has_no_faults_where_none_was_asked_for(
    quantized_demo: QuantizedDemo, tmp_path: Path
) -> None:
    path = export(quantized_demo.towers["text"].original, tmp_path / "text.onnx")
    found = audit_graph(path, units=[])
    assert found.fp8 == found.faults == ()
    assert len(found.not_fp8) == 2 * 8 + 1
    assert found.num_quantize == found.num_weights == 0


@pytest.fixture(scope="module")
def without_two(
    quantized_demo: QuantizedDemo, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Unit]]:
    """The image tower's graph with two units in 16 bit, and the others."""
    tower = copy.deepcopy(quantized_demo.quantized["image"].tower)
    original = copy.deepcopy(quantized_demo.towers["image"].original)
    kept = [
        unit
        for unit in units_of(tower)
        if unit.name.endswith(("2.attention.qkv", "3.attention.products"))
    ]
    names = [name for unit in kept for name in (*unit.points, *unit.layers)]
    replace(tower, {name: original.get_submodule(name) for name in names})
    path = export(in_16_bit(tower), tmp_path_factory.mktemp("kept") / "image.onnx")
    return path, [unit for unit in units_of(tower) if unit not in kept]


def test_units_in_16_bit_are_told_apart(without_two: tuple[Path, list[Unit]]) -> None:
    path, quantized = without_two
    found = audit_graph(path, units=quantized)
    assert found.faults == ()
    layers = tuple(f"/backbone/blocks.2/attention/{n}/MatMul" for n in ("key", "query", "value"))
    products = tuple(f"/backbone/blocks.3/attention/{n}" for n in ("MatMul", "MatMul_1"))
    assert set(found.not_fp8) == {*layers, *products, *IN_16_BIT["image"]}
    assert found.num_quantize == 4 * 8 - 1 - 4
    assert found.num_weights == 4 * 6 - 3


def test_a_unit_that_was_not_quantized(
    without_two: tuple[Path, list[Unit]], units: list[Unit]
) -> None:
    faults = audit_graph(without_two[0], units=units).faults
    assert faults == (
        "/backbone/blocks.2/attention/key/MatMul: should be FP8 and is not",
        "/backbone/blocks.2/attention/query/MatMul: should be FP8 and is not",
        "/backbone/blocks.2/attention/value/MatMul: should be FP8 and is not",
        "/backbone/blocks.3/attention/MatMul: should be FP8 and is not",
        "/backbone/blocks.3/attention/MatMul_1: should be FP8 and is not",
        "27 activations are quantized, 32 should be",
        "21 weights are FP8, 24 should be",
    )


def test_a_unit_that_should_not_have_been_quantized(
    graphs: Mapping[tuple[str, str], Path], units: list[Unit]
) -> None:
    asked = [unit for unit in units if not unit.name.endswith("blocks.1.feed_forward.fc1")]
    assert audit_graph(graphs["image", "float16"], units=asked).faults == (
        "/backbone/blocks.1/feed_forward/fc1/MatMul: is FP8 and should not be",
        "32 activations are quantized, 31 should be",
        "24 weights are FP8, 23 should be",
    )


def node_named(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    (node,) = (node for node in graph.node if node.name == name)
    return node


def store_weight_in_16_bit(graph: onnx.GraphProto) -> None:
    product = node_named(graph, f"{QUERY}/MatMul")
    graph.node.remove(node_named(graph, f"{QUERY}/DequantizeLinear"))
    graph.initializer.append(
        numpy_helper.from_array(np.zeros((128, 128), dtype=np.float16), "plain")
    )
    product.input[1] = "plain"


def quantize_projection(graph: onnx.GraphProto) -> None:
    product = node_named(graph, "/projection/MatMul")
    scale, zero = node_named(graph, f"{QUERY}/DequantizeLinear").input[1:3]
    quantize = helper.make_node("QuantizeLinear", [product.input[0], scale, zero], ["q"], "extra")
    dequantize = helper.make_node("DequantizeLinear", ["q", scale, zero], ["dq"], "extra_dq")
    product.input[0] = "dq"
    graph.node.extend([quantize, dequantize])


def feed_residual(graph: onnx.GraphProto) -> None:
    rounded = node_named(graph, "/backbone/blocks.0/feed_forward/fc1_point/DequantizeLinear")
    add = node_named(graph, "/backbone/blocks.0/Add_1")
    add.input[0] = rounded.output[0]


def quantize_both_operands_of_projection(graph: onnx.GraphProto) -> None:
    quantize_projection(graph)
    node_named(graph, "/projection/MatMul").input[1] = node_named(
        graph, f"{QUERY}/DequantizeLinear"
    ).output[0]


def drop_query_point(graph: onnx.GraphProto) -> None:
    point = "/backbone/blocks.0/attention/query_point"
    quantize = node_named(graph, f"{point}/QuantizeLinear")
    dequantize = node_named(graph, f"{point}/DequantizeLinear")
    node_named(graph, "/backbone/blocks.0/attention/MatMul").input[0] = quantize.input[0]
    graph.node.remove(quantize)
    graph.node.remove(dequantize)


def rename_product(graph: onnx.GraphProto) -> None:
    node_named(graph, f"{QUERY}/MatMul").name = "/fused/MatMul"


def zero_of(graph: onnx.GraphProto, point: str) -> onnx.NodeProto:
    """The Constant that says to what type a point quantizes."""
    zero = node_named(graph, f"{point}/QuantizeLinear").input[2]
    (node,) = (node for node in graph.node if zero in node.output)
    return node


def give_type(graph: onnx.GraphProto, data_type: int) -> None:
    zero = zero_of(graph, POINT)
    del zero.attribute[:]
    zero.attribute.append(
        helper.make_attribute("value", helper.make_tensor("zero", data_type, [], [0]))
    )


def test_the_type_may_stand_in_an_initializer(
    graphs: Mapping[tuple[str, str], Path], units: list[Unit], tmp_path: Path
) -> None:
    model = onnx.load(str(graphs["image", "float16"]))
    zero = zero_of(model.graph, POINT)
    tensor = helper.make_tensor(zero.output[0], onnx.TensorProto.FLOAT8E4M3FN, [], [0])
    model.graph.node.remove(zero)
    model.graph.initializer.append(tensor)
    onnx.save(model, str(tmp_path / "image.onnx"))
    assert audit_graph(tmp_path / "image.onnx", units=units).faults == ()


def quantize_to_int8(graph: onnx.GraphProto) -> None:
    give_type(graph, onnx.TensorProto.INT8)


def quantize_to_e5m2(graph: onnx.GraphProto) -> None:
    give_type(graph, onnx.TensorProto.FLOAT8E5M2)


def quantize_to_no_named_type(graph: onnx.GraphProto) -> None:
    """Which is uint8, says ONNX."""
    del node_named(graph, f"{POINT}/QuantizeLinear").input[2]


def store_weight_in_int8(graph: onnx.GraphProto) -> None:
    name = node_named(graph, f"{QUERY}/DequantizeLinear").input[0]
    (weight,) = (tensor for tensor in graph.initializer if tensor.name == name)
    weight.data_type = onnx.TensorProto.INT8


NOT_E4M3 = f"{POINT}/QuantizeLinear: quantizes to another type than FP8 E4M3"


@pytest.mark.parametrize(
    ("broken", "faults"),
    [
        (quantize_to_int8, (NOT_E4M3,)),
        (quantize_to_e5m2, (NOT_E4M3,)),
        (quantize_to_no_named_type, (NOT_E4M3,)),
        (store_weight_in_int8, ("23 weights are FP8, 24 should be",)),
        (
            store_weight_in_16_bit,
            (
                f"{QUERY}/MatMul: only one operand is FP8",
                "23 weights are FP8, 24 should be",
            ),
        ),
        (
            quantize_projection,
            (
                "/projection/MatMul: only one operand is FP8",
                "33 activations are quantized, 32 should be",
            ),
        ),
        (
            quantize_both_operands_of_projection,
            (
                "/projection/MatMul: is FP8 and should not be",
                "33 activations are quantized, 32 should be",
            ),
        ),
        (
            feed_residual,
            (
                "/backbone/blocks.0/feed_forward/fc1_point/DequantizeLinear: read by Add "
                "/backbone/blocks.0/Add_1, which is no product",
            ),
        ),
        (
            drop_query_point,
            (
                "/backbone/blocks.0/attention/MatMul: only one operand is FP8",
                "31 activations are quantized, 32 should be",
            ),
        ),
        (
            rename_product,
            (
                "/fused/MatMul: is FP8 and should not be",
                "only 31 products were found for the units to quantize",
            ),
        ),
    ],
)
def test_each_kind_of_fault_is_found(
    graphs: Mapping[tuple[str, str], Path],
    units: list[Unit],
    tmp_path: Path,
    broken: Callable[[onnx.GraphProto], None],
    faults: tuple[str, ...],
) -> None:
    model = onnx.load(str(graphs["image", "float16"]))
    broken(model.graph)
    onnx.save(model, str(tmp_path / "image.onnx"))
    assert audit_graph(tmp_path / "image.onnx", units=units).faults == faults


def audit_with(faults: tuple[str, ...]) -> Audit:
    return Audit(fp8=(), not_fp8=(), num_quantize=0, num_weights=0, faults=faults)


def test_faults_are_an_error() -> None:
    check(audit_with(()), path=Path("engine/image.onnx"))
    with pytest.raises(QuantizationError) as caught:
        check(audit_with(("one", "two")), path=Path("engine/image.onnx"))
    text = str(caught.value)
    assert text.startswith("image.onnx: the exported graph is not the quantized tower: one; two. ")
    assert "constraints.txt" in text


def test_many_faults_are_counted() -> None:
    with pytest.raises(QuantizationError, match=r"tower: 0; 1; 2; 3; 4 and 3 more\. "):
        check(audit_with(tuple(map(str, range(8)))), path=Path("image.onnx"))


@pytest.mark.parametrize("modality", MODALITIES)
def test_onnx_runtime_does_what_modelopt_simulates(
    quantized_demo: QuantizedDemo, graphs: Mapping[tuple[str, str], Path], modality: str
) -> None:
    held_out = quantized_demo.towers[modality].held_out
    simulated = embed(quantized_demo.quantized[modality].fake_quantized, held_out)
    cosines = row_cosines(run_onnx(graphs[modality, "float32"], held_out), simulated)
    # Sums in another order bring a value over the middle between two FP8 numbers in some rows,
    # which then differ as if quantized once more; the others agree as float32 does.
    assert np.median(cosines) > 1 - 1e-6
    assert np.mean(cosines > 1 - 1e-5) > 0.7
    assert cosines.mean() > 0.9999
    assert cosines.min() > 0.995


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_graph_that_ships_is_close_to_what_modelopt_simulates_in_16_bit(
    quantized_demo: QuantizedDemo, graphs: Mapping[tuple[str, str], Path], modality: str
) -> None:
    held_out = quantized_demo.towers[modality].held_out
    simulated = embed(in_16_bit(quantized_demo.quantized[modality].fake_quantized), held_out)
    shipped = run_onnx(graphs[modality, "float16"], held_out)
    assert shipped.dtype == np.float32
    assert row_cosines(shipped, simulated).mean() > 0.999
