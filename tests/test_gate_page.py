"""The page of a gate's report: all its numbers, in order, and nothing that runs or loads."""

import dataclasses
import re
from itertools import pairwise

import pytest

from engine.accuracy import Agreement, Recall, Thresholds
from engine.gate import GateReport, Histogram, Top1
from engine.manifest import Manifest, Quantization
from engine.preprocess import Preprocessing
from engine.speeds import Speed
from pipelines.gate_page import histogram_plot, render_gate_page
from tests.pages import HOSTILE, Page

ENGINE_ID = "fp8-8899aabbccddeeff"


def histogram(*counts: int, first: float = 0.98) -> Histogram:
    step = (1 - first) / len(counts)
    edges = (*(first + step * number for number in range(len(counts))), 1.0)
    return Histogram(edges=edges, counts=counts)


PASSED = GateReport(
    engine_id=ENGINE_ID,
    checkpoint="acme/clip",
    backend="tensorrt",
    device="sm_90",
    created_at="2026-03-01T10:23:41+00:00",
    sample_uri="s3://bucket/products",
    sample_digest="ab" * 32,
    thresholds=Thresholds(
        min_cosine_p1=0.985,
        min_cosine_min=0.91,
        min_neighbour_overlap=0.94,
        max_recall_loss=0.015,
        max_top1_loss=0.025,
    ),
    agreements={
        "image": Agreement(
            num_rows=1256,
            cosine_mean=0.99812,
            cosine_p1=0.99134,
            cosine_min=0.98256,
            neighbour_overlap=0.95478,
        ),
        "text": Agreement(
            num_rows=1255,
            cosine_mean=0.99921,
            cosine_p1=0.99743,
            cosine_min=0.99362,
            neighbour_overlap=0.96687,
        ),
    },
    histograms={"image": histogram(2, 54, 0, 1200), "text": histogram(0, 5, 1250)},
    recalls=(
        Recall(
            direction="text-to-image",
            reference={1: 0.61234, 5: 0.83456, 10: 0.91678},
            measured={1: 0.60123, 5: 0.82343, 10: 0.90567},
        ),
        Recall(
            direction="image-to-text",
            reference={1: 0.62468, 5: 0.84579, 10: 0.92681},
            measured={1: 0.61357, 5: 0.83468, 10: 0.91571},
        ),
    ),
    top1=Top1(num_classes=37, reference=0.71234, measured=0.70512),
    speeds=(
        Speed(encoder="fp8 tensorrt", modality="image", batch_rows=1, rows_per_second=812.4),
        Speed(encoder="fp8 tensorrt", modality="image", batch_rows=1024, rows_per_second=42_318.7),
        Speed(encoder="fp16 tensorrt", modality="image", batch_rows=1, rows_per_second=798.2),
    ),
    memory_bytes={"fp8 tensorrt": 1536 * 2**20, "fp16 tensorrt": 3 * 2**30},
    faults=(),
)
FAILED = dataclasses.replace(
    PASSED,
    faults=(
        "image: 1st percentile of cosines 0.9713 is below 0.985",
        "text-to-image recall@10 loses 0.0311, more than 0.015",
    ),
)
MANIFEST = Manifest(
    engine_id=ENGINE_ID,
    checkpoint="acme/clip",
    revision=None,
    checkpoint_digest="cd" * 32,
    precision="fp8",
    embedding_dim=512,
    preprocessing=Preprocessing(
        height=2,
        width=2,
        resize=(2, 2),
        crop=(2, 2),
        resample=3,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        rescale_factor=1 / 255,
    ),
    text=None,
    quantization=Quantization(
        calibration_uri="s3://bucket/calibration",
        calibration_digest="ef" * 32,
        num_calibration_rows=1512,
        kept_in_16_bit=(
            "image.backbone.blocks.3.attention.qkv",
            "image.backbone.blocks.11.feed_forward.fc2",
            "text.backbone.blocks.0.attention.products",
        ),
    ),
    files={},
    versions={},
)


def page_of(report: GateReport = PASSED, manifest: Manifest = MANIFEST) -> Page:
    return Page(render_gate_page(report, manifest=manifest))


def with_quantization(**changes: object) -> Manifest:
    assert MANIFEST.quantization is not None
    quantization = dataclasses.replace(MANIFEST.quantization, **changes)
    return dataclasses.replace(MANIFEST, quantization=quantization)


# The verdict


def test_an_engine_that_passed() -> None:
    page = page_of()
    assert page.text("h1") == f"Gate of {ENGINE_ID}"
    assert page.text("h2").startswith("Passed ")
    assert "The engine may be promoted." in page.text("p")
    assert page.all("li") == []
    assert "2026-03-01T10:23:41+00:00, by tensorrt on sm_90." in page.text("p")
    assert [a["class"] for a in page.all("section") if "class" in a] == ["bottleneck"]


def test_an_engine_that_failed_says_why_before_all_numbers() -> None:
    html = render_gate_page(FAILED, manifest=MANIFEST)
    page = Page(html)
    assert page.text("h2").startswith("Failed ")
    assert [text for tag, text in page.texts if tag == "li"] == list(FAILED.faults)
    assert "may be promoted" not in html
    assert html.index(FAILED.faults[1]) < html.index("<table")
    assert [a["class"] for a in page.all("section") if "class" in a] == ["bottleneck failed"]


# The numbers


def test_facts_of_the_engine() -> None:
    page = page_of()
    assert page.after("checkpoint") == ["acme/clip"]
    assert page.after("precision") == ["fp8"]
    assert page.after("dimension") == ["512"]
    assert page.after("calibrated with") == ["1,512 rows of s3://bucket/calibration"]
    assert page.after("judged by") == ["held-out rows of s3://bucket/products"]
    assert page.after("kept in 16 bit") == ["image 3.qkv, 11.fc2; text 0.products"]


def test_an_engine_that_keeps_nothing_or_was_not_quantized() -> None:
    assert page_of(manifest=with_quantization(kept_in_16_bit=())).after("kept in 16 bit") == [
        "no unit"
    ]
    fp16 = dataclasses.replace(MANIFEST, precision="fp16", quantization=None)
    page = page_of(manifest=fp16)
    assert page.after("precision") == ["fp16"]
    assert page.after("calibrated with") == ["nothing"]
    assert "kept in 16 bit" not in page.text("th")


def test_agreement_beside_its_thresholds() -> None:
    page = page_of()
    assert page.after("row by row") == []
    heads = [text for tag, text in page.texts if tag == "th"]
    start = heads.index("row by row")
    assert heads[start : start + 4] == ["row by row", "image", "text", "at least"]
    assert page.after("cosine, mean") == ["0.9981", "0.9992"]
    assert page.after("cosine, 1st percentile") == ["0.9913", "0.9974", "0.985"]
    assert page.after("cosine, lowest") == ["0.9826", "0.9936", "0.91"]
    assert page.after("overlap of ten neighbours") == ["0.9548", "0.9669", "0.94"]
    assert page.after("rows") == ["1,256", "1,255"]


def test_recall_and_zero_shot_beside_the_reference() -> None:
    page = page_of()
    assert page.after("text-to-image recall@1") == ["0.6123", "0.6012"]
    assert page.after("text-to-image recall@5") == ["0.8346", "0.8234"]
    assert page.after("text-to-image recall@10") == ["0.9168", "0.9057"]
    assert page.after("image-to-text recall@1") == ["0.6247", "0.6136"]
    assert page.after("image-to-text recall@5") == ["0.8458", "0.8347"]
    assert page.after("image-to-text recall@10") == ["0.9268", "0.9157"]
    assert page.after("zero-shot top-1 of 37 classes") == ["0.7123", "0.7051"]
    assert "At most 0.015 of recall@10 and 0.025 of top-1 may be lost." in page.text("p")


def test_speed_and_memory_of_each_encoder() -> None:
    page = page_of()
    heads = [text for tag, text in page.texts if tag == "th"]
    start = heads.index("rows/s, by batch")
    assert heads[start : start + 3] == ["rows/s, by batch", "fp8 tensorrt", "fp16 tensorrt"]
    assert page.after("image \u00d7 1") == ["812", "798"]
    assert page.after("image \u00d7 1,024") == ["42,319"]
    assert "fp8 tensorrt 1.50 GiB, fp16 tensorrt 3.00 GiB." in page.text("p")


def test_on_a_cpu_with_images_alone_what_was_not_measured_is_left_out() -> None:
    report = dataclasses.replace(
        PASSED,
        agreements={"image": PASSED.agreements["image"]},
        histograms={"image": PASSED.histograms["image"]},
        recalls=(),
        top1=None,
        speeds=(),
        memory_bytes={},
    )
    page = page_of(report)
    heads = page.text("h2")
    assert heads == "Passed Engine Agreement with the float32 reference Cosines: image"
    assert page.after("cosine, lowest") == ["0.9826", "0.91"]
    assert len(page.all("svg")) == 1


def test_recall_without_labels_and_labels_without_recall() -> None:
    page = page_of(dataclasses.replace(PASSED, top1=None))
    assert "zero-shot" not in page.text("th")
    assert "0.015 of recall@10" in page.text("p")
    page = page_of(dataclasses.replace(PASSED, recalls=()))
    assert "recall@" not in page.text("th")
    assert page.after("zero-shot top-1 of 37 classes") == ["0.7123", "0.7051"]


def test_a_value_that_is_no_number_is_shown_as_it_is() -> None:
    broken = dataclasses.replace(
        PASSED.agreements["image"], cosine_min=float("nan"), cosine_p1=float("nan")
    )
    page = page_of(dataclasses.replace(FAILED, agreements={"image": broken}))
    assert page.after("cosine, lowest") == ["nan", "0.91"]


def test_nothing_was_measured() -> None:
    faults = ("image: not judged, since the sample has none",)
    report = dataclasses.replace(
        PASSED, agreements={}, histograms={}, recalls=(), top1=None, faults=faults
    )
    page = page_of(report)
    assert page.text("li") == faults[0]
    assert page.all("svg") == []


# The histograms


def test_a_histogram_says_how_many_rows_lie_below_the_threshold() -> None:
    shown = histogram(2, 54, 1200, 0, first=0.96)
    plot = histogram_plot(shown, modality="image", threshold=0.98)
    assert plot.alt == "image: 1,256 rows, 56 of them below 0.98"
    texts = Page(plot.svg).text("text")
    assert "rows by cosine (dashed: 0.98, for the 1st percentile)" in texts
    assert "cosine to the float32 reference" in texts


def test_rows_of_a_bin_that_the_threshold_cuts_may_lie_on_either_side() -> None:
    plot = histogram_plot(histogram(2, 54, 1200, first=0.97), modality="text", threshold=0.985)
    assert plot.alt == "text: 1,256 rows, 2 to 56 of them below 0.985"


def test_bars_are_as_high_as_their_counts() -> None:
    plot = histogram_plot(histogram(10, 0, 40, 20), modality="image", threshold=0.99)
    outline = max(
        (path["d"] for path in Page(plot.svg).all("path") if "fill: none" in path.get("style", "")),
        key=len,
    )
    levels = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", outline)]
    bottom, heights = max(levels), {}
    for y, after in pairwise(levels):
        if y == after:  # the top of a bar
            heights[round(bottom - y, 3)] = None
    ten, zero, forty, twenty = heights
    assert zero == 0
    assert forty == pytest.approx(4 * ten, rel=1e-3)
    assert twenty == pytest.approx(2 * ten, rel=1e-3)


@pytest.mark.parametrize("threshold", [0.95, 0.97, 0.985])
def test_the_threshold_is_within_the_plot(threshold: float) -> None:
    plot = histogram_plot(histogram(2, 54, 1200, first=0.97), modality="text", threshold=threshold)
    page = Page(plot.svg)
    (line,) = (a for a in page.all("path") if "var(--warning)" in a.get("style", ""))
    (place,) = set(re.findall(r"[ML] ([\d.]+) ", line["d"]))
    (box,) = page.all("rect")  # the clip of the plot's inside
    left, width = float(box["x"]), float(box["width"])
    assert left + 0.01 * width < float(place) < left + 0.9 * width


def test_each_histogram_is_drawn_and_described() -> None:
    page = page_of()
    drawn = [attributes for _, attributes in page.elements if attributes.get("role") == "img"]
    assert [attributes["aria-label"] for attributes in drawn] == [
        "image: 1,256 rows, 2 of them below 0.985",
        "text: 1,255 rows, 0 of them below 0.985",
    ]
    assert page.text("figcaption").count("rows, ") == 2


# The page


def test_same_report_same_bytes() -> None:
    assert render_gate_page(PASSED, manifest=MANIFEST) == render_gate_page(
        PASSED, manifest=MANIFEST
    )


@pytest.mark.parametrize("report", [PASSED, FAILED])
def test_ids_are_unique_and_references_resolve(report: GateReport) -> None:
    html = render_gate_page(report, manifest=MANIFEST)
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r"url\(#([^)]*)\)", html)
    references += [attributes["href"][1:] for attributes in page.all("use")]
    references += [a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a]
    assert len(references) > 10
    assert set(references) <= set(ids)


@pytest.mark.parametrize("report", [PASSED, FAILED])
def test_nothing_runs_and_nothing_is_loaded(report: GateReport) -> None:
    html = render_gate_page(report, manifest=MANIFEST)
    page = Page(html)
    assert page.all("script") == page.all("link") == page.all("iframe") == page.all("img") == []
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in {"src", "href", "xlink:href", "srcset", "action"} & attributes.keys():
            assert attributes[name].startswith("#"), (tag, name)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "http:" not in html
    assert "https:" not in html
    policies = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_hostile_texts_are_texts() -> None:
    report = dataclasses.replace(
        FAILED,
        engine_id=HOSTILE,
        checkpoint=HOSTILE,
        backend=HOSTILE,
        device=HOSTILE,
        sample_uri=HOSTILE,
        faults=(HOSTILE,),
        speeds=(dataclasses.replace(PASSED.speeds[0], encoder=HOSTILE),),
        memory_bytes={HOSTILE: 7},
    )
    page = page_of(report, with_quantization(calibration_uri=HOSTILE))
    assert page.all("script") == page.all("img") == []
    assert page.text("h1") == f"Gate of {HOSTILE}"
    assert page.text("title") == f"Clipmill gate of {HOSTILE}"
    assert page.after("checkpoint") == [HOSTILE]
    assert page.after("judged by") == [f"held-out rows of {HOSTILE}"]
    assert page.after("calibrated with") == [f"1,512 rows of {HOSTILE}"]
    assert page.text("li") == HOSTILE
    assert HOSTILE in [text for tag, text in page.texts if tag == "th"]
    assert f"Memory of the device: {HOSTILE} 7 B." in page.text("p")


def test_is_accessible() -> None:
    page = page_of(FAILED)
    assert page.all("html") == [{"lang": "en"}]
    assert all(header.get("scope") in ("row", "col") for header in page.all("th"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    named = [a.get("aria-labelledby") for a in page.all("section")]
    assert all(named)
