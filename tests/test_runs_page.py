"""Tests of pipelines/runs/runs_page.py: what a reader finds on it."""

import dataclasses
import re

from pipelines.runs.run_records import night
from pipelines.runs.runs_page import MAX_LABELS, nights_plot, render_runs_page
from tests.pages import HOSTILE, Page
from tests.recorded_runs import record

FAILED = dataclasses.replace(record(4), status="failed", numbers=None, error="StoreError: full")
RECORDS = [
    record(1),
    record(2, seconds=200.0, num_rejected=77),
    record(3, engine_id="fp8-other", slow="3,000 rows/s from the first batch on"),
    FAILED,
]


def test_a_night_is_told_to_the_minute():
    assert night(record(1)) == "2026-03-01 03:15"


def test_a_page_has_all_runs_the_newest_first():
    page = render_runs_page(RECORDS, store_uri="s3://bucket/vectors")
    parsed = Page(page)
    assert parsed.after("2026-03-02 03:15")[:7] == [
        *("committed", "7", "480,000", "77", "3 min 20 s", "2.4k", "833"),
    ]
    assert parsed.after("2026-03-04 03:15")[0] == "failed:"
    assert "StoreError: full" in parsed.text("bdi")
    assert parsed.after("2026-03-03 03:15")[5] == "4.8k (slow)"
    assert page.index("2026-03-04 03:15") < page.index("2026-03-01 03:15</th>")


def test_the_plot_tells_engines_and_measures_apart():
    plot = nights_plot(RECORDS)
    assert plot is not None
    for text in ("rows/s", "GPU-seconds per million rows", "rejects of the run", "fp8-other"):
        assert text in plot.svg
    assert plot.alt == (
        "4 runs from 2026-03-01 03:15 to 2026-03-04 03:15, of which 3 embedded rows, 2.4k to 4.8k "
        "a second, the last 4.8k; 1 failed or were killed"
    )


def test_on_cpus_there_is_no_plot_of_gpus():
    plot = nights_plot([record(n, num_gpus=0.0) for n in (1, 2)])
    assert plot is not None
    assert "GPU-seconds" not in plot.svg


def test_one_run_is_no_plot():
    assert nights_plot([record(1), FAILED]) is None
    assert "nothing to plot" in render_runs_page([record(1)], store_uri="s")


def test_many_nights_share_few_labels():
    plot = nights_plot([record(n) for n in range(1, 32)])
    assert plot is not None
    assert 1 < len(re.findall(r">03-\d\d<", plot.svg)) <= MAX_LABELS


def test_runs_of_one_day_are_told_by_their_time():
    later = dataclasses.replace(record(1), started_at="2026-03-01T17:40:00+00:00")
    plot = nights_plot([record(1), later])
    assert plot is not None
    assert re.findall(r">(\d\d:\d\d)<", plot.svg) == ["03:15", "17:40"]


def test_what_others_wrote_is_no_markup():
    hostile = dataclasses.replace(FAILED, error=HOSTILE)
    page = render_runs_page([record(1, engine_id=HOSTILE), record(2), hostile], store_uri=HOSTILE)
    assert Page(page).all("script") == []
    assert Page(page).all("img") == []
