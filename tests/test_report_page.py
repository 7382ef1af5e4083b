"""Tests of pipelines/runs/report_page.py: the page is parsed, its pictures are decoded again."""

import base64
import dataclasses
import io
import re
from itertools import pairwise

import matplotlib
import pytest
from PIL import Image

from pipelines.counts import KeyCounts
from pipelines.runs.report import RunReport, StageReport
from pipelines.runs.report_page import (
    MAX_INLINE_BYTES,
    MAX_INTERVALS,
    Hit,
    QuerySheet,
    duration_text,
    rate_plot,
    rejects_plot,
    render_page,
    size_text,
    thumbnail_uri,
)
from pipelines.schema import REASONS
from tests import image_files
from tests.pages import HOSTILE, Page

REPORT = RunReport(
    run_id="20260301T101502-4fe2a1",
    created_at="2026-03-01T10:23:41+00:00",
    catalog_uri="s3://catalog/products/*.parquet",
    store_uri="s3://embeddings/products",
    checkpoint="openai/clip-vit-base-patch32",
    engine_id="9b1cf2e07a44d1c8",
    backend="onnxruntime",
    decoder="cpu",
    embedding_dim=512,
    snapshot=7,
    committed=True,
    num_catalog_rows=1_250_118,
    num_keys=1_249_804,
    num_embedded={"image": 998_412, "text": 1_000_001},
    num_copied={"image": 1_234, "text": 0},
    num_unchanged={"image": 249_010, "text": 249_300},
    plan={
        "image": KeyCounts(
            num_new=1,
            num_changed=2,
            num_retried=3,
            num_moved=4,
            num_unchanged=5,
            num_staged=0,
            num_deleted=7,
            num_twins=0,
        )
    },
    num_stored={"image": 1_247_422, "text": 1_249_301},
    rejects_by_reason={"fetch_failed": 1402, "null_image": 640, "empty_text": 2},
    seconds=464.0,
    stages=[
        StageReport(
            stage="read",
            num_rows=1_000_003,
            num_bytes=3 * 2**30,
            busy_seconds=310.4,
            core_seconds=295.0,
            workers=8,
            busy_share=0.084,
            rows_per_second=25_773.2,
        ),
        StageReport(
            stage="encode",
            num_rows=1_998_413,
            num_bytes=0,
            busy_seconds=1850.2,
            core_seconds=1700.0,
            workers=4,
            busy_share=0.961,
            rows_per_second=4_320.5,
        ),
    ],
    samples=[(0.0, 0), (1.0, 50), (2.0, 200), (2.0, 200)],
    bottleneck="encode-bound: its 4 workers were busy 96% of the run",
)


def hit(key: str = "k", **changes) -> Hit:
    fields = {"score": 0.25, "image": None, "caption": None, "is_expected": False}
    return Hit(key=key, **{**fields, **changes})


def sheet(*hits: Hit, query: str = "a red bicycle", query_image: bytes | None = None) -> QuerySheet:
    return QuerySheet(query=query, query_image=query_image, hits=hits)


def decoded(uri: str) -> tuple[str, Image.Image]:
    match = re.fullmatch(r"data:(image/\w+);base64,([A-Za-z0-9+/=]+)", uri)
    assert match is not None
    image = Image.open(io.BytesIO(base64.b64decode(match[2], validate=True)))
    image.load()
    return match[1], image


class TestNumbers:
    def test_verdict(self):
        page = Page(render_page(REPORT))
        terms = [text for tag, text in page.texts if tag == "dt"]
        values = [text for tag, text in page.texts if tag == "dd"]
        assert terms == ["embedded by this run", "unchanged", "rejected"]
        assert values[::2] == ["1,998,413", "498,310", "2,044"]
        assert values[1] == "image 998,412 · text 1,000,001"
        assert page.text("h1") == "Clipmill run 20260301T101502-4fe2a1"
        assert "Committed snapshot 7, 7 min 44 s" in page.text("p")

    def test_bottleneck_comes_before_all_tables(self):
        html = render_page(REPORT)
        assert html.count(REPORT.bottleneck) == 1
        assert html.index(REPORT.bottleneck) < html.index("<table")

    def test_key_numbers(self):
        page = Page(render_page(REPORT))
        assert page.after("catalog") == ["s3://catalog/products/*.parquet"]
        assert page.after("store") == ["s3://embeddings/products"]
        assert page.after("checkpoint") == ["openai/clip-vit-base-patch32"]
        assert page.after("engine") == ["9b1cf2e07a44d1c8"]
        assert page.after("dimension") == ["512"]
        assert page.after("snapshot") == ["7, committed by this run"]
        assert page.after("catalog rows") == ["1,250,118"]
        assert page.after("distinct keys") == ["1,249,804"]
        planned = "1 new, 2 changed, 4 moved, 3 retried, 5 unchanged, 7 deleted"
        assert page.after("image planned") == [planned]
        assert page.after("image") == ["998,412", "1,234", "249,010", "1,247,422"]
        assert page.after("text") == ["1,000,001", "0", "249,300", "1,249,301"]

    def test_stages(self):
        html = render_page(REPORT)
        page = Page(html)
        assert page.after("rows") == ["1,000,003", "1,998,413"]
        assert page.after("bytes") == ["3.00 GiB", "n/a"]
        assert page.after("busy seconds") == ["310.4", "1,850.2"]
        assert page.after("workers") == ["8", "4"]
        assert page.after("busy share") == ["8%", "96%"]
        assert page.after("rows/s alone") == ["25,773", "4,320"]
        assert re.findall(r'style="width: ([\d.]+%)"', html) == ["8.4%", "96.1%"]

    def test_uncommitted(self):
        page = Page(render_page(dataclasses.replace(REPORT, committed=False)))
        assert "Nothing changed; snapshot 7 stays current" in page.text("p")
        assert page.after("snapshot")[0].startswith("7, not committed")

    def test_one_modality(self):
        report = dataclasses.replace(
            REPORT,
            num_embedded={},
            num_copied={},
            num_unchanged={"image": 5},
            num_stored={"image": 5},
        )
        assert Page(render_page(report)).after("image") == ["0", "0", "5", "5"]

    @pytest.mark.parametrize(
        ("num_bytes", "text"),
        [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (10 * 2**20, "10.0 MiB"),
            (1000 * 2**20, "0.98 GiB"),
            (150 * 2**30, "150 GiB"),
            (5000 * 2**50, "5,000 PiB"),
        ],
    )
    def test_size_text(self, num_bytes, text):
        assert size_text(num_bytes) == text

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0.0, "0.0 s"),
            (4.24, "4.2 s"),
            (59.96, "1 min 00 s"),
            (185.0, "3 min 05 s"),
            (3599.6, "1 h 00 min"),
            (7800.0, "2 h 10 min"),
            (3_600_000.0, "1,000 h 00 min"),
        ],
    )
    def test_duration_text(self, seconds, text):
        assert duration_text(seconds) == text


class TestSafety:
    def test_texts_are_escaped_everywhere(self):
        report = dataclasses.replace(
            REPORT,
            run_id=HOSTILE,
            catalog_uri=HOSTILE,
            store_uri=HOSTILE,
            checkpoint=HOSTILE,
            engine_id=HOSTILE,
            backend=HOSTILE,
            bottleneck=HOSTILE,
            num_stored={HOSTILE: 1},
            rejects_by_reason={HOSTILE: 3, "$x": 1, "$y$": 1},
            stages=[dataclasses.replace(REPORT.stages[0], stage=HOSTILE)],
        )
        picture = image_files.jpeg()
        sheets = [sheet(hit(HOSTILE, caption=HOSTILE, image=picture), query=HOSTILE)]
        page = Page(render_page(report, sheets=sheets))
        assert page.all("script") == []
        # One picture, ours; the hostile key is in its alt text, as text.
        (img,) = page.all("img")
        assert img["src"].startswith("data:image/jpeg;base64,")
        assert img["alt"] == f"picture of {HOSTILE}"
        assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
        isolated = [text for tag, text in page.texts if tag == "bdi"]
        assert isolated == [*[HOSTILE] * 5, "512", *[HOSTILE] * 3]
        assert page.text("h1") == f"Clipmill run {HOSTILE}"
        assert HOSTILE[:30] in page.text("text"), "the reason as it is, in the plot"
        (described,) = [a["aria-label"] for _, a in page.elements if "Rejects" in str(a)]
        assert HOSTILE in described
        assert "$y$" in page.text("text"), "not read as a formula"

    def test_loads_nothing(self):
        html = render_page(REPORT, sheets=[sheet(hit(image=image_files.png()))])
        page = Page(html)
        assert page.all("link") == page.all("script") == page.all("iframe") == []
        for tag, attributes in page.elements:
            for name in {"src", "href", "xlink:href", "srcset", "action"} & attributes.keys():
                assert attributes[name].startswith(("data:image/", "#")), (tag, name)
        assert "@import" not in html
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
        assert "http:" not in html
        assert "https:" not in html
        policies = [m["content"] for m in page.all("meta") if "http-equiv" in m]
        assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]

    def test_long_texts_are_cut(self):
        long = "word " * 20_000
        html = render_page(REPORT, sheets=[sheet(hit("k" * 9000, caption=long), query=long)])
        assert len(html) - len(render_page(REPORT)) < 2000
        assert html.count("…") == 3


class TestMarkup:
    def test_same_report_same_bytes(self):
        sheets = [sheet(hit(image=image_files.jpeg(image_files.photo(400, 300))))]
        first = render_page(REPORT, sheets=sheets)
        with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path"}):
            assert render_page(REPORT, sheets=sheets) == first
        assert matplotlib.rcParams["text.color"] == "black", "global style untouched"

    def test_ids_are_unique_and_references_resolve(self):
        html = render_page(REPORT)
        page = Page(html)
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        references = re.findall(r"url\(#([^)]*)\)", html)
        references += [attributes["href"][1:] for attributes in page.all("use")]
        references += [a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a]
        assert len(references) > 10
        assert set(references) <= set(ids)

    def test_is_accessible(self):
        page = Page(render_page(REPORT, sheets=[sheet(hit(image=image_files.png()))]))
        assert page.all("html") == [{"lang": "en"}]
        assert all(header.get("scope") in ("row", "col") for header in page.all("th"))
        assert all(picture["alt"] for picture in page.all("img"))
        drawn = [attributes for _, attributes in page.elements if attributes.get("role") == "img"]
        assert len(drawn) == len(page.all("svg")) == 2
        assert all(len(attributes["aria-label"]) > 20 for attributes in drawn)
        levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))

    def test_plots_take_the_colours_of_the_page(self):
        html = render_page(REPORT)
        drawings = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawings)) == {
            "none",
            *(f"var(--{name})" for name in ("ink", "muted", "accent", "warning")),
        }
        assert "<style" not in drawings
        for name in ("ink", "muted", "accent", "warning"):
            assert html.count(f"--{name}: #") == 2, "light and dark"


class TestRate:
    @pytest.mark.parametrize(
        "samples", [[], [(0.0, 0)], [(5.0, 100)], [(0.0, 0), (0.0, 0)], [(3.0, 1), (3.0, 64)]]
    )
    def test_no_plot_without_time(self, samples):
        assert rate_plot(samples) is None
        page = Page(render_page(dataclasses.replace(REPORT, samples=samples)))
        assert ("Too short to plot" if samples else "Nothing was encoded") in page.text("p")

    def test_rates(self):
        plot = rate_plot([(0.0, 0), (1.0, 50), (2.0, 200)])
        assert plot is not None
        expected = "200 rows encoded in 2.0 s: 100 rows/s on average, between 50 and 150"
        assert plot.alt == expected
        texts = Page(plot.svg).text("text")
        assert "rows/s (dashed: mean 100)" in texts
        assert "rows so far" in texts
        assert "seconds" in texts

    def test_intervals_without_length_make_no_spike(self):
        samples = [(0.0, 0), (1.0, 100), (1.0, 140), (2.0, 200), (2.0, 200), (2.0001, 200)]
        plot = rate_plot(samples)
        assert plot is not None
        assert plot.alt.endswith("100 rows/s on average, between 100 and 100")

    def test_nothing_encoded(self):
        plot = rate_plot([(0.0, 0), (1.0, 0)])
        assert plot is not None
        assert plot.alt.startswith("0 rows encoded")

    def test_a_long_run_is_drawn_no_finer_than_the_page_shows(self):
        samples = [(float(second), 1000 * second) for second in range(20_001)]
        plot = rate_plot(samples)
        assert plot is not None
        assert plot.alt.endswith("1k rows/s on average, between 1k and 1k")
        assert "20,000,000 rows encoded in 5 h 33 min" in plot.alt
        assert "hours" in Page(plot.svg).text("text")
        longest = max(path["d"].count("\n") for path in Page(plot.svg).all("path"))
        assert longest <= 2 * MAX_INTERVALS + 4
        assert len(plot.svg) < 60_000

    def test_minutes(self):
        plot = rate_plot([(0.0, 0), (600.0, 1)])
        assert plot is not None
        assert "minutes" in Page(plot.svg).text("text")


class TestRejects:
    def test_bars(self):
        plot = rejects_plot({"empty_text": 2, "fetch_failed": 1402, "null_image": 0, "b": 2})
        assert plot is not None
        assert plot.alt == "Rejects by reason: fetch_failed 1,402, b 2, empty_text 2"
        texts = Page(plot.svg).text("text")
        assert texts == "fetch_failed b empty_text 1,402 2 2"

    def test_every_reason_and_large_counts_fit(self):
        rejects = dict.fromkeys(sorted(REASONS), 123_456_789)
        plot = rejects_plot(rejects)
        assert plot is not None
        texts = Page(plot.svg)
        (box,) = texts.all("svg")
        width = float(box["viewbox"].split()[2])
        counts = [text for text in texts.all("text") if "start" in text["style"]]
        assert len(counts) == len(REASONS)
        # At 10 px a digit is 6.4 px wide in the font that matplotlib measures with, a comma 3.2.
        assert max(float(text["x"]) for text in counts) + 9 * 6.4 + 2 * 3.2 <= width

    @pytest.mark.parametrize("rejects", [{}, {"null_image": 0}])
    def test_no_rejects(self, rejects):
        assert rejects_plot(rejects) is None
        page = Page(render_page(dataclasses.replace(REPORT, rejects_by_reason=rejects)))
        assert "No rejects: every row" in page.text("p")
        assert len(page.all("svg")) == 1

    def test_nothing_to_do(self):
        report = dataclasses.replace(REPORT, stages=[], samples=[], rejects_by_reason={}, seconds=0)
        page = Page(render_page(report))
        assert page.all("svg") == []
        assert "No stage ran." in page.text("p")
        assert "of embedding" not in page.text("p")


class TestContactSheet:
    def test_pictures(self):
        hits = (
            hit("wide", image=image_files.jpeg(image_files.photo(640, 320)), score=0.3456),
            hit("small", image=image_files.png(image_files.flat()), caption="a red field"),
            hit("text-only", caption="words"),
        )
        page = Page(
            render_page(
                REPORT, sheets=[sheet(*hits, query_image=image_files.webp(image_files.flat()))]
            )
        )
        query, wide, small = (decoded(picture["src"]) for picture in page.all("img"))
        assert (query[0], query[1].size) == ("image/webp", image_files.SIZE)
        assert (wide[0], wide[1].size) == ("image/jpeg", (160, 80))
        assert (small[0], small[1].size) == ("image/png", image_files.SIZE)
        assert small[1].convert("RGB").getpixel((5, 5)) == image_files.RED
        assert len(page.all("li")) == 3
        assert page.text("h3", "bdi").endswith(
            "a red bicycle wide a red field small words text-only"
        )
        assert "0.346" in page.text("span")
        assert "no picture" in page.text("span")

    def test_expected_match_is_said_in_words(self):
        hits = (hit("a"), hit("b", is_expected=True), hit("c"))
        page = Page(render_page(REPORT, sheets=[sheet(*hits)]))
        assert [item.get("class", "") for item in page.all("li")] == ["", "expected", ""]
        assert page.all("li")[1]["aria-label"] == "rank 2, expected match"
        assert page.text().count("✓ expected match") == 1

    def test_damaged_picture_does_not_stop_the_report(self):
        broken = [b"", b"no image", image_files.truncated_jpeg()]
        page = Page(
            render_page(
                REPORT, sheets=[sheet(*(hit(str(i), image=b) for i, b in enumerate(broken)))]
            )
        )
        assert page.all("img") == []
        assert page.text("span").count("no usable picture:") == 3
        assert "truncated_image" in page.text("span")

    def test_no_hits_and_no_sheets(self):
        assert "Nothing found." in Page(render_page(REPORT, sheets=[sheet()])).text("p")
        assert "Example queries" not in Page(render_page(REPORT)).text("h2")

    def test_sizes_of_many_large_pictures(self):
        large = image_files.png(image_files.photo(1000, 800))
        assert len(large) > 10**6
        html = render_page(REPORT, sheets=[sheet(*(hit(str(i), image=large) for i in range(6)))])
        assert len(html) < 200_000


class TestThumbnail:
    @pytest.mark.parametrize("name", sorted(image_files.VALID))
    def test_every_format_becomes_one_that_browsers_show(self, name):
        uri, reason = thumbnail_uri(image_files.VALID[name]())
        assert reason == ""
        assert uri is not None
        mime_type, image = decoded(uri)
        assert Image.MIME[image.format] in (mime_type, "image/mpo")
        assert mime_type in ("image/jpeg", "image/png", "image/webp")
        assert max(image.size) <= 160

    def test_rotated_photo_is_upright(self):
        uri, _ = thumbnail_uri(image_files.exif_rotated_jpeg(6, image_files.four_corners(400, 200)))
        assert uri is not None
        _, image = decoded(uri)
        assert image.size == (160, 80)
        red, green, blue = image.convert("RGB").getpixel((20, 20))
        assert red > 200
        assert max(green, blue) < 60

    def test_small_but_heavy_picture_is_made_lighter(self):
        exif = Image.Exif()
        exif[0x010E] = "x" * 40_000
        heavy = image_files.jpeg(exif=exif)
        assert len(heavy) > MAX_INLINE_BYTES
        uri, _ = thumbnail_uri(heavy)
        assert uri is not None
        assert len(uri) < 4000
