"""The gate on the demo engine, whole and sabotaged, and on encoders with known answers."""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from engine.accuracy import HISTOGRAM_BINS, Thresholds, row_cosines
from engine.backends.encoder import Encoder
from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.gate import PROMPT, GateReport, run_gate
from engine.manifest import Manifest
from engine.reference import ReferenceEncoder
from engine.sample import Sample
from engine.towers import Tower
from tests.quantized import NUM_HELD_OUT, QuantizedDemo, write_demo_engine

NUM_ROWS = 100
BLOCK = "backbone.blocks.1"


def gate(encoder: Encoder, reference: Encoder, sample: Sample, **other: Any) -> GateReport:
    settings: dict[str, Any] = {
        "thresholds": Thresholds(),
        "backend": "onnxruntime",
        "device": "a CPU",
        "baselines": {},
        "batch_sizes": (),
        "on_progress": lambda stage, done, total: None,
    }
    return run_gate(encoder, reference, sample, **{**settings, **other})


@pytest.fixture(scope="module")
def write(
    quantized_demo: QuantizedDemo, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Tower, Tower], OnnxCpuEncoder]:
    """Write an fp8 engine of these towers in 16 bit, and load it."""

    def write_and_load(image: Tower, text: Tower) -> OnnxCpuEncoder:
        folder = tmp_path_factory.mktemp("engine")
        image, text = (copy.deepcopy(tower).to_dtype(torch.float16) for tower in (image, text))
        write_demo_engine(folder, quantized_demo.model, image=image, text=text, precision="fp8")
        return OnnxCpuEncoder(folder, num_threads=1)

    return write_and_load


@pytest.fixture(scope="module")
def reference(
    quantized_demo: QuantizedDemo,
    good: OnnxCpuEncoder,
    tmp_path_factory: pytest.TempPathFactory,
) -> ReferenceEncoder:
    model = copy.deepcopy(quantized_demo.model)
    folder = tmp_path_factory.mktemp("reference")
    manifest = write_demo_engine(
        folder, model, image=model.image_tower, text=model.text_tower, precision="fp32"
    )
    return ReferenceEncoder(model, engine_dir=folder, manifest=manifest, device="cpu")


@pytest.fixture(scope="module")
def good(
    quantized_demo: QuantizedDemo, write: Callable[[Tower, Tower], OnnxCpuEncoder]
) -> OnnxCpuEncoder:
    towers = {name: result.tower for name, result in quantized_demo.quantized.items()}
    return write(towers["image"], towers["text"])


@pytest.fixture(scope="module")
def held_out(quantized_demo: QuantizedDemo) -> Sample:
    return Sample(uri="catalog", pixels=quantized_demo.pixels, texts=quantized_demo.texts)


@pytest.fixture(scope="module")
def report(good: OnnxCpuEncoder, reference: ReferenceEncoder, held_out: Sample) -> GateReport:
    return gate(good, reference, held_out)


def test_the_demo_engine_passes(report: GateReport, good: OnnxCpuEncoder, held_out: Sample) -> None:
    assert report.passed
    assert report.faults == ()
    assert report.engine_id == good.manifest.engine_id
    assert report.checkpoint == "acme/demo"
    assert (report.backend, report.device) == ("onnxruntime", "a CPU")
    assert (report.sample_uri, report.sample_digest) == ("catalog", held_out.digest)
    assert report.thresholds == Thresholds()
    assert report.created_at.endswith("+00:00")
    assert set(report.agreements) == {"image", "text"}
    for agreed in report.agreements.values():
        assert agreed.num_rows == NUM_HELD_OUT
        assert 0.99 < agreed.cosine_p1 < agreed.cosine_mean < 0.99999  # not the reference itself
    for recall in report.recalls:
        assert recall.reference[10] > 0.95
        assert recall.measured[10] > 0.95
    assert report.top1 is None
    assert report.speeds == ()
    assert report.memory_bytes == {}


def test_histograms_count_every_row(
    report: GateReport, good: OnnxCpuEncoder, reference: ReferenceEncoder, held_out: Sample
) -> None:
    for histogram in report.histograms.values():
        assert sum(histogram.counts) == NUM_HELD_OUT
        assert len(histogram.counts) == HISTOGRAM_BINS
        assert len(histogram.edges) == HISTOGRAM_BINS + 1
        assert list(histogram.edges) == sorted(histogram.edges)
        assert histogram.edges[-1] == 1
        assert histogram.edges[0] <= 0.99
    assert held_out.pixels is not None
    cosines = row_cosines(
        good.encode_images(held_out.pixels), reference.encode_images(held_out.pixels)
    )
    shown = report.histograms["image"]
    middle = HISTOGRAM_BINS // 2
    below = np.count_nonzero(cosines < shown.edges[middle])
    assert abs(sum(shown.counts[:middle]) - below) <= 1


def test_the_report_is_json(report: GateReport) -> None:
    read = json.loads(json.dumps(dataclasses.asdict(report), allow_nan=False))
    assert read["agreements"]["image"]["num_rows"] == NUM_HELD_OUT
    assert read["recalls"][0]["direction"] == "text-to-image"
    assert read["recalls"][0]["measured"].keys() == {"1", "5", "10"}
    assert read["thresholds"]["min_cosine_p1"] == 0.99
    assert read["faults"] == []
    assert read["passed"] is True


def clip_activations(tower: Tower) -> None:
    # Sixteen times as large would do no harm: FP8 is a floating format.
    tower.get_submodule(f"{BLOCK}.attention.input_point").scale /= 16


def scale_weights(tower: Tower) -> None:
    tower.get_submodule(f"{BLOCK}.feed_forward.fc1").scale *= 16


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("sabotage", [clip_activations, scale_weights])
def test_a_sabotaged_scale_is_caught(
    quantized_demo: QuantizedDemo,
    write: Callable[[Tower, Tower], OnnxCpuEncoder],
    reference: ReferenceEncoder,
    held_out: Sample,
    sabotage: Callable[[Tower], None],
    modality: str,
) -> None:
    towers = {n: copy.deepcopy(result.tower) for n, result in quantized_demo.quantized.items()}
    sabotage(towers[modality])
    found = gate(write(towers["image"], towers["text"]), reference, held_out)
    assert not found.passed
    assert any(fault.startswith(f"{modality}: 1st percentile of cos") for fault in found.faults)
    other = {"image": "text", "text": "image"}[modality]
    assert not any(fault.startswith(other) and "to" not in fault for fault in found.faults)
    assert sum(found.histograms[modality].counts) == NUM_HELD_OUT


class Known:
    """An encoder that knows the embedding of each row: images by their first byte."""

    device_memory_bytes = 0

    def __init__(
        self,
        manifest: Manifest,
        *,
        images: np.ndarray | None = None,
        texts: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.manifest = manifest
        self._images = rows() if images is None else images
        self._texts = known_texts() if texts is None else texts
        self.calls: list[tuple[str, int]] = []
        self.asked: list[str] = []

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        self.calls.append(("image", len(pixels)))
        return self._images[pixels[:, 0, 0, 0].astype(int)]

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(("text", len(texts)))
        self.asked += list(texts)
        return np.stack([self._texts[text] for text in texts])


def rows() -> np.ndarray:
    drawn = np.random.default_rng(0).standard_normal((NUM_ROWS, 32))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def known_texts() -> dict[str, np.ndarray]:
    """Row i's text is where its image is; `even` and `odd` are half of the axes each."""
    texts = {str(row): embedding for row, embedding in enumerate(rows())}
    for place, name in enumerate(("even", "odd")):
        texts[PROMPT.format(name)] = np.eye(32, dtype=np.float32)[place]
    return texts


@pytest.fixture(scope="module")
def manifest(good: OnnxCpuEncoder) -> Manifest:
    return good.manifest


def known_sample(**other: Any) -> Sample:
    pixels = np.zeros((NUM_ROWS, 2, 2, 3), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(NUM_ROWS)
    texts = tuple(map(str, range(NUM_ROWS)))
    return Sample(**{"uri": "catalog", "pixels": pixels, "texts": texts, **other})


def with_lost_images(num_lost: int) -> np.ndarray:
    """Some images where another's text is, far from their own."""
    images = rows()
    images[:num_lost] = -images[:num_lost]
    return images


LENIENT = Thresholds(min_cosine_p1=0, min_cosine_min=0, min_neighbour_overlap=0)


@pytest.mark.parametrize(("num_lost", "passed"), [(0, True), (1, True), (2, False)])
def test_recall_may_be_lost_up_to_the_threshold(
    manifest: Manifest, num_lost: int, passed: bool
) -> None:
    thresholds = Thresholds(
        min_cosine_p1=0, min_cosine_min=0, min_neighbour_overlap=0, max_recall_loss=0.01
    )
    ours = Known(manifest, images=with_lost_images(num_lost))
    found = gate(ours, Known(manifest), known_sample(), thresholds=thresholds)
    lost = [fault for fault in found.faults if "recall" in fault]
    expected = [
        f"{direction} recall@10 loses 0.0200, more than 0.01"
        for direction in ("text-to-image", "image-to-text")
    ]
    assert lost == ([] if passed else expected)
    assert found.recalls[0].reference[10] == 1
    assert found.recalls[0].measured[10] == pytest.approx(1 - num_lost / 100)


@pytest.mark.parametrize(
    ("num_lost", "max_recall_loss", "num_faults"), [(1, 0.01, 0), (2, 0.01, 2), (1, 0.0, 2)]
)
def test_of_few_rows_one_may_be_lost(
    manifest: Manifest, num_lost: int, max_recall_loss: float, num_faults: int
) -> None:
    whole = known_sample()
    assert whole.pixels is not None
    assert whole.texts is not None
    sample = known_sample(
        pixels=whole.pixels[:64], texts=whole.texts[:64], labels=("even", *[None] * 63)
    )
    ours = Known(manifest, images=with_lost_images(num_lost))
    thresholds = dataclasses.replace(LENIENT, max_recall_loss=max_recall_loss)
    found = gate(ours, Known(manifest), sample, thresholds=thresholds)
    lost = [fault for fault in found.faults if "recall" in fault]
    assert len(lost) == num_faults
    if num_lost == 2:
        assert lost[0] == "text-to-image recall@10 loses 0.0312, more than 0.015625"


def test_recall_that_the_engine_gains_is_no_fault(manifest: Manifest) -> None:
    reference = Known(manifest, images=with_lost_images(30))
    found = gate(Known(manifest), reference, known_sample(), thresholds=LENIENT)
    assert not any("recall" in fault for fault in found.faults)


@pytest.mark.parametrize(("num_lost", "passed"), [(1, True), (2, False)])
def test_zero_shot_accuracy_may_be_lost_up_to_the_threshold(
    manifest: Manifest, num_lost: int, passed: bool
) -> None:
    images = rows()
    images[:, 0] = np.where(np.arange(NUM_ROWS) % 2 == 0, 9, -9)
    images[:, 1] = -images[:, 0]
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    labels = tuple(("even", "odd")[row % 2] for row in range(NUM_ROWS))
    wrong = images.copy()
    wrong[:num_lost, :2] *= -1
    ours, reference = Known(manifest, images=wrong), Known(manifest, images=images)
    found = gate(ours, reference, known_sample(labels=labels), thresholds=LENIENT)
    assert found.top1 is not None
    assert found.top1.num_classes == 2
    assert found.top1.reference == 1
    assert found.top1.measured == pytest.approx(1 - num_lost / 100)
    lost = [fault for fault in found.faults if "zero-shot" in fault]
    assert lost == ([] if passed else ["zero-shot top-1 loses 0.0200, more than 0.01"])
    assert {"a photo of a even.", "a photo of a odd."} <= set(ours.asked) & set(reference.asked)


def test_rows_without_a_label_say_nothing_of_zero_shot_accuracy(manifest: Manifest) -> None:
    # Four images have a label, and the engine takes one of them for the other class.
    classes = known_texts()
    images = rows()
    images[:3] = classes[PROMPT.format("even")]
    wrong = images.copy()
    wrong[2] = classes[PROMPT.format("odd")]
    labels = ("even", "even", "even", "odd", *[None] * (NUM_ROWS - 4))
    images[3] = wrong[3] = classes[PROMPT.format("odd")]
    ours, reference = Known(manifest, images=wrong), Known(manifest, images=images)
    found = gate(ours, reference, known_sample(labels=labels), thresholds=LENIENT)
    assert found.top1 is not None
    assert (found.top1.reference, found.top1.measured) == (1, 0.75)
    assert not any("zero-shot" in fault for fault in found.faults)  # one of four
    wrong[1] = wrong[2]
    faults = gate(ours, reference, known_sample(labels=labels), thresholds=LENIENT).faults
    assert "zero-shot top-1 loses 0.5000, more than 0.25" in faults
    none = known_sample(labels=(None,) * NUM_ROWS)
    assert gate(ours, reference, none, thresholds=LENIENT).top1 is None


def test_labels_say_nothing_of_an_engine_without_texts(manifest: Manifest) -> None:
    image_only = dataclasses.replace(manifest, text=None)
    sample = known_sample(texts=None, labels=("even",) * NUM_ROWS)
    found = gate(Known(image_only), Known(image_only), sample)
    assert found.passed
    assert found.top1 is None
    assert found.recalls == ()
    assert set(found.agreements) == {"image"}


def test_texts_are_of_no_use_to_an_engine_without_them(manifest: Manifest) -> None:
    image_only = dataclasses.replace(manifest, text=None)
    ours = Known(image_only)
    assert set(gate(ours, Known(image_only), known_sample()).agreements) == {"image"}
    assert ours.asked == []


@pytest.mark.parametrize(("missing", "modality"), [("pixels", "image"), ("texts", "text")])
def test_a_tower_that_was_not_judged_does_not_pass(
    manifest: Manifest, missing: str, modality: str
) -> None:
    found = gate(Known(manifest), Known(manifest), known_sample(**{missing: None}))
    assert found.faults == (f"{modality}: not judged, since the sample has none",)


def test_rows_that_are_not_numbers_fail_and_are_shown(manifest: Manifest) -> None:
    images = rows()
    images[3] = np.nan
    images[4] = -images[4]
    found = gate(Known(manifest, images=images), Known(manifest), known_sample())
    assert any(fault.startswith("image: lowest cosine nan") for fault in found.faults)
    shown = found.histograms["image"]
    assert sum(shown.counts) == NUM_ROWS
    assert shown.edges[0] == pytest.approx(-1)
    assert shown.counts[0] == 1
    middle = HISTOGRAM_BINS // 2
    assert sum(shown.counts[middle - 1 : middle + 1]) == 1  # NaN as 0
    assert shown.counts[-1] == NUM_ROWS - 2


def test_copies_of_a_text_are_embedded_once(manifest: Manifest) -> None:
    texts = tuple(str(row % 7) for row in range(NUM_ROWS))
    ours = Known(manifest)
    found = gate(ours, Known(manifest), known_sample(texts=texts))
    assert sorted(ours.asked) == list("0123456")
    assert found.agreements["text"].num_rows == NUM_ROWS
    assert found.agreements["text"].cosine_min == pytest.approx(1)
    # An image's own text is one of fourteen copies: all of them are right.
    nearest = (rows() @ rows()[:7].T).argmax(axis=1)
    right = np.mean(nearest == np.arange(NUM_ROWS) % 7)
    to_text = found.recalls[1]
    assert to_text.direction == "image-to-text"
    assert to_text.measured == to_text.reference == pytest.approx({1: right, 5: right, 10: right})


def test_progress_tells_stage_and_rows(manifest: Manifest) -> None:
    steps: list[tuple[str, int, int]] = []
    gate(
        Known(manifest),
        Known(manifest),
        known_sample(),
        on_progress=lambda *step: steps.append(step),
    )
    assert steps == [
        (f"{stage}: {modality}", done, NUM_ROWS)
        for stage in ("engine", "reference")
        for modality in ("image", "text")
        for done in (0, 64, NUM_ROWS)
    ]


class OnCard(Known):
    """One of several plans on a card."""

    device_memory_bytes = 100


def test_speed_beside_the_baselines(manifest: Manifest) -> None:
    found = gate(
        Known(manifest),
        Known(manifest),
        known_sample(),
        baselines={"fp16 torch": OnCard(manifest)},
        batch_sizes=(1, 2 * NUM_ROWS),
    )
    assert [(speed.encoder, speed.modality, speed.batch_rows) for speed in found.speeds] == [
        (encoder, modality, batch_rows)
        for encoder in ("fp8 onnxruntime", "fp16 torch")
        for modality in ("image", "text")
        for batch_rows in (1, 2 * NUM_ROWS)
    ]
    assert found.memory_bytes == {"fp16 torch": 100}
    assert found.passed


def test_the_plan_for_queries_is_judged_too(manifest: Manifest) -> None:
    bulk, wrong = Known(manifest), Known(manifest, images=with_lost_images(2))
    found = gate(bulk, Known(manifest), known_sample(), query_encoder=wrong)
    assert found.faults == (
        "image by the plan for queries: 1st percentile of cosines -1.0000 is below 0.99",
        "image by the plan for queries: lowest cosine -1.0000 is below 0.9",
    )
    assert found.agreements["image"].cosine_min == pytest.approx(1)
    assert found.query_agreements["image"].cosine_min == pytest.approx(-1)
    assert found.query_agreements["text"].cosine_min == pytest.approx(1)
    whole = gate(bulk, Known(manifest), known_sample(), query_encoder=Known(manifest))
    assert whole.passed
    assert gate(bulk, Known(manifest), known_sample()).query_agreements == {}


def test_few_rows_are_timed_by_the_plan_for_queries(manifest: Manifest) -> None:
    bulk, query, fp16_bulk, fp16_query = (OnCard(manifest) for _ in range(4))
    found = gate(
        bulk,
        Known(manifest),
        known_sample(),
        batch_sizes=(1, 8, 64, 256),
        baselines={"fp16 onnxruntime": fp16_bulk},
        query_encoder=query,
        query_baselines={"fp16 onnxruntime": fp16_query},
    )
    assert [speed.batch_rows for speed in found.speeds] == [1, 8, 64, 256] * 4
    for for_many, for_few in ((bulk, query), (fp16_bulk, fp16_query)):
        assert not {("image", 1), ("image", 8), ("text", 1)} & set(for_many.calls)
        assert not {("image", 256), ("text", 256)} & set(for_few.calls)
        assert {("image", 1), ("text", 8)} <= set(for_few.calls)
        assert ("image", 256) in for_many.calls
    assert found.memory_bytes == {
        name: 100
        for precision in ("fp8", "fp16")
        for name in (f"{precision} onnxruntime", f"{precision} onnxruntime, for queries")
    }
