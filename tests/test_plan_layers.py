"""What TensorRT says of a plan, as layers; the lines are those of real builds."""

import json

import pytest

from engine.plans.plan_layers import (
    Layer,
    LayerTensor,
    activation_bytes_from_log,
    fallbacks,
    layers_from_inspector,
    layers_from_log,
    layers_json,
)

# TensorRT for RTX 1.7.1, verbose log of ViT-B/16 in FP8, for sm_89; tensors shortened.
LINEAR = (
    "Name: /a/value/MatMul+/a/key/MatMul+/a/query/MatMul_myl0_4, LayerType: gemm, Inputs: [ { Name:"
    " /a/input_point/QuantizeLinear_output_0.1_myl0, Dimensions: [-1,768], Strides: [768,1], "
    "StrideOrder: [1,0], Datatype: FP8, Format: (Linear) Row major linear format }], Constants: [ "
    "{ Name: __mye147942_dconst_myl0, Dimensions: [768,2304], Strides: [2304,1], StrideOrder: "
    "[1,0], Datatype: FP8, Format: (Linear) Row major linear format }, { Name: __mye135144_myl0, "
    "Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major "
    "linear format }], Outputs: [ { Name: __mye147947_myl0, Dimensions: [-1,2304], Strides: "
    "[2304,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format }], "
    "TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: /a/value/MatMul][ONNX "
    "Layer: /a/key/MatMul][ONNX Layer: /a/query/MatMul][ONNX Layer: /a/query/DequantizeLinear]"
)
WAIT = (
    "Name: __mye26487_myl0_6, LayerType: wait, Inputs: [], Constants: [], Outputs: [], "
    "TacticName: , StreamId: 1, EventId: 1, Metadata: "
)


def tensors(*dtypes: str) -> tuple[LayerTensor, ...]:
    return tuple(LayerTensor(name="x", dtype=each, dimensions=(2,)) for each in dtypes)  # type: ignore[arg-type]


def layer(
    *onnx_layers: str,
    kind: str = "gemm",
    inputs: tuple[str, ...] = (),
    constants: tuple[str, ...] = (),
) -> Layer:
    return Layer(
        name="x",
        type=kind,
        inputs=tensors(*inputs),
        outputs=(),
        constants=tensors(*constants),
        tactic="",
        onnx_layers=onnx_layers,
    )


def test_layers_of_a_log() -> None:
    messages = ["Engine generation completed", f"Layers:\n{LINEAR}\n{WAIT}\n\nI/O Tensors:\n"]
    linear, wait = layers_from_log(messages)
    assert linear == Layer(
        name="/a/value/MatMul+/a/key/MatMul+/a/query/MatMul_myl0_4",
        type="gemm",
        inputs=(
            LayerTensor(
                name="/a/input_point/QuantizeLinear_output_0.1_myl0",
                dtype="fp8",
                dimensions=(-1, 768),
            ),
        ),
        outputs=(LayerTensor(name="__mye147947_myl0", dtype="fp16", dimensions=(-1, 2304)),),
        constants=(
            LayerTensor(name="__mye147942_dconst_myl0", dtype="fp8", dimensions=(768, 2304)),
            LayerTensor(name="__mye135144_myl0", dtype="fp32", dimensions=(1,)),
        ),
        tactic="__myelin_CASK_STUB",
        onnx_layers=(
            "/a/value/MatMul",
            "/a/key/MatMul",
            "/a/query/MatMul",
            "/a/query/DequantizeLinear",
        ),
    )
    assert wait.type == "wait"
    assert wait.inputs == wait.onnx_layers == ()


def test_activation_bytes_of_a_log() -> None:
    messages = ["Total Activation Memory: 1 bytes", "x", "Total Activation Memory: 8645632 bytes"]
    assert activation_bytes_from_log(messages) == 8645632
    assert activation_bytes_from_log(["Total Weights Memory: 1105296 bytes"]) is None


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"Format/Datatype": "Row major linear FP16 format"}, "fp16"),  # TensorRT 10
        ({"Format/Datatype": "FP8"}, "fp8"),
        ({"Format/Datatype": "Channel major BFloat16 format"}, "bf16"),
        ({"Datatype": "Half", "Format": "(Linear) Row major linear format"}, "fp16"),
        ({"DataType": "Float", "Format": "Row major linear FP32 format (kLINEAR)"}, "fp32"),
        ({"Datatype": "UInt8"}, "uint8"),
        ({"Datatype": "Int64"}, "int64"),
        ({"Datatype": "E8M0"}, "other"),
    ],
)
def test_layers_of_an_inspector(fields: dict[str, str], dtype: str) -> None:
    information = {
        "Layers": [
            {
                "Name": "fc1",
                "LayerType": "gemm",
                "Inputs": [{"Name": "x", "Dimensions": [8, 768], **fields}],
                "Outputs": [],
                "TacticName": "sm90_xmma",
                "StreamId": 0,
                "Metadata": "[ONNX Layer: /fc1/MatMul]\x1e[ONNX Layer: /fc1/Add]",
            }
        ]
    }
    (found,) = layers_from_inspector(json.dumps(information))
    assert found == Layer(
        name="fc1",
        type="gemm",
        inputs=(LayerTensor(name="x", dtype=dtype, dimensions=(8, 768)),),  # type: ignore[arg-type]
        outputs=(),
        constants=(),
        tactic="sm90_xmma",
        onnx_layers=("/fc1/MatMul", "/fc1/Add"),
    )


def test_layers_as_json() -> None:
    (found,) = json.loads(layers_json(layers_from_log([LINEAR])))
    assert found.keys() == {
        "name",
        "type",
        "inputs",
        "outputs",
        "constants",
        "tactic",
        "onnx_layers",
    }
    assert found["inputs"][0]["dtype"] == "fp8"


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([layer("a", inputs=("fp8",), constants=("fp8", "fp32"))], ("b", "c")),
        ([layer("a", "b", "c", inputs=("fp8",), constants=("fp8",))], ()),  # merged
        ([layer("a", inputs=("fp16",), constants=("fp16",))], ("a", "b", "c")),
        ([layer("a", inputs=("fp16",), constants=("fp8",))], ("a", "b", "c")),
        ([layer("a", inputs=("fp8", "fp8")), layer("b", "c")], ("b", "c")),
        # The fused attention: query, key and value.
        ([layer("a", "b", kind="kgen", inputs=("fp8", "fp8", "fp8"))], ("c",)),
        ([layer("a", "b", kind="kgen", inputs=("fp8", "fp8", "fp16"))], ("a", "b", "c")),
        # Pads an operand; reads the product.
        ([layer("a", kind="kgen", inputs=("fp8",))], ("a", "b", "c")),
        ([layer("a", kind="kgen", inputs=("fp16",))], ("a", "b", "c")),
        ([], ("a", "b", "c")),
    ],
)
def test_fallbacks(layers: list[Layer], expected: tuple[str, ...]) -> None:
    assert fallbacks(layers, fp8_products={"a", "b", "c"}) == expected
