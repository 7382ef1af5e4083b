"""Plans' names, records and checks."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import PlanError
from engine.manifest import Manifest, TextInput, file_digest
from engine.plans.plan import (
    BULK,
    QUERY,
    PlanKey,
    PlanProfile,
    PlanRecord,
    TowerPlan,
    check_fits,
    input_shapes,
    read_plan,
    read_verified,
)
from engine.preprocess import Preprocessing

KEY = PlanKey(flavour="tensorrt", version="11.4.0.106", architecture="sm_90", profile=BULK)
IMAGE = TowerPlan(
    min_shape=(256, 224, 224, 3),
    max_shape=(256, 224, 224, 3),
    plan_bytes=9,
    activation_bytes=1000,
    num_fp8_products=96,
    fallbacks=(),
)
TEXT = TowerPlan(
    min_shape=(256, 8),
    max_shape=(256, 77),
    plan_bytes=9,
    activation_bytes=None,
    num_fp8_products=94,
    fallbacks=("/fc1/MatMul", "/fc2/MatMul"),
)
MANIFEST = Manifest(
    engine_id="fp8-1",
    checkpoint="x",
    revision=None,
    checkpoint_digest="0",
    precision="fp8",
    embedding_dim=512,
    preprocessing=Preprocessing(
        height=224,
        width=336,
        resize=(224, 336),
        crop=None,
        resample=3,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    text=TextInput(max_tokens=77, pad_token_id=0),
    files={},
    versions={},
)


@pytest.fixture
def record(tmp_path: Path) -> PlanRecord:
    """A plan folder, whole."""
    for name in ("image.plan", "text.plan"):
        (tmp_path / name).write_bytes(b"a " + name.encode())
    made = PlanRecord(
        engine_id="fp8-1",
        key=KEY,
        image=IMAGE,
        text=TEXT,
        build_seconds=61.5,
        files={path.name: file_digest(path) for path in tmp_path.iterdir()},
    )
    made.write(tmp_path)
    return made


def test_plan_ids() -> None:
    assert KEY.plan_id == "tensorrt-11.4.0.106-sm_90-bulk256"
    rtx = PlanKey(flavour="tensorrt_rtx", version="1.7.1.116", architecture="sm_89", profile=QUERY)
    assert rtx.plan_id == "tensorrt_rtx-1.7.1.116-sm_89-query8"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kind": "huge", "max_rows": 1}, "kind='huge': expected 'bulk' or 'query'"),
        ({"kind": "bulk", "max_rows": 0}, "max_rows=0: expected 1 or more"),
    ],
)
def test_profiles_out_of_bounds(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PlanProfile(**fields)


def test_input_shapes() -> None:
    assert input_shapes(MANIFEST, BULK) == {
        "image": ((256, 224, 336, 3), (256, 224, 336, 3)),
        "text": ((256, 8), (256, 77)),
    }
    assert input_shapes(MANIFEST, QUERY) == {
        "image": ((1, 224, 336, 3), (8, 224, 336, 3)),
        "text": ((1, 8), (8, 77)),
    }
    padded = TextInput(max_tokens=64, pad_token_id=0, pads_to_max=True)
    short = TextInput(max_tokens=5, pad_token_id=0)
    for text, shapes in ((padded, ((1, 64), (8, 64))), (short, ((1, 5), (8, 5)))):
        assert input_shapes(dataclasses.replace(MANIFEST, text=text), QUERY)["text"] == shapes
    assert input_shapes(dataclasses.replace(MANIFEST, text=None), BULK).keys() == {"image"}


def test_a_record_is_read_as_written(record: PlanRecord, tmp_path: Path) -> None:
    assert read_plan(tmp_path) == record
    assert list(record.towers) == ["image", "text"]
    assert read_verified(record, tmp_path, name="text.plan") == b"a text.plan"
    image_only = dataclasses.replace(record, text=None)
    image_only.write(tmp_path)
    assert read_plan(tmp_path) == image_only
    assert list(image_only.towers) == ["image"]


def test_what_fell_back_is_put_in_words(record: PlanRecord) -> None:
    assert record.precision_in_words() == (
        "image 96 of 96 products in FP8; "
        "text 94 of 96 products in FP8, in 16 bit /fc1/MatMul, /fc2/MatMul"
    )
    none = dataclasses.replace(IMAGE, num_fp8_products=0)
    assert dataclasses.replace(record, image=none, text=None).precision_in_words() == (
        "image without FP8"
    )


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no plan there \(plan.json is missing\)"):
        read_plan(tmp_path)
    with pytest.raises(PlanError, match=r"no plan there \(plan.json is missing\)"):
        read_plan(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format_version": 1}',
        '{"format_version": 1, "key": {"profile": {}}, "image": {}, "text": null}',
        "\x00\xff",
    ],
)
def test_a_damaged_record(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content, encoding="latin-1")
    with pytest.raises(PlanError, match=r"damaged .*; remove the folder, the next run builds it"):
        read_plan(tmp_path)


def test_a_record_from_the_future(record: PlanRecord, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(PlanError, match=r"written by a newer Clipmill \(format 2\); upgrade"):
        read_plan(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"architecture": "sm_80"},
            "plan built for sm_90, this GPU is sm_80; run `clipmill engine build` there",
        ),
        (
            {"flavour": "tensorrt_rtx"},
            "plan built by tensorrt, here is tensorrt_rtx; run `clipmill engine build` there",
        ),
        (
            {"version": "10.13.3.9"},
            "plan built by tensorrt 11.4.0.106, here is 10.13.3.9; run `clipmill engine build` "
            "there, or install 11.4.0.106",
        ),
        (
            {"profile": QUERY},
            "plan tensorrt-11.4.0.106-sm_90-bulk256 is not tensorrt-11.4.0.106-sm_90-query8; run "
            "`clipmill engine build` there",
        ),
    ],
)
def test_a_plan_for_elsewhere(record: PlanRecord, change: dict[str, Any], text: str) -> None:
    check_fits(record, engine_id="fp8-1", here=KEY)
    with pytest.raises(PlanError) as caught:
        check_fits(record, engine_id="fp8-1", here=dataclasses.replace(KEY, **change))
    assert str(caught.value) == text


def test_a_plan_of_another_engine(record: PlanRecord) -> None:
    with pytest.raises(PlanError, match="plan of engine fp8-1, wanted is fp8-2: name its own"):
        check_fits(record, engine_id="fp8-2", here=KEY)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_file(record: PlanRecord, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "text.plan"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-1] + (b"\0" if damage == "flipped" else b""))
    text = " is damaged, it does not match its checksum; "
    if damage == "missing":
        text = ": cannot be read (No such file or directory); "
    with pytest.raises(PlanError) as caught:
        read_verified(record, tmp_path, name="text.plan")
    assert f"{path}{text}remove the folder, the next run builds it anew" in str(caught.value)
    assert read_verified(record, tmp_path, name="image.plan") == b"a image.plan"


def test_a_file_that_the_record_does_not_know(record: PlanRecord, tmp_path: Path) -> None:
    (tmp_path / "other.plan").write_bytes(b"x")
    with pytest.raises(PlanError, match="does not match its checksum"):
        read_verified(record, tmp_path, name="other.plan")
