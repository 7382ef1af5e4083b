"""`clipmill bench`: figures that are measured, and options that must be given."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from engine.build import load_or_build
from engine.checkpoint import find_checkpoint
from engine.errors import ClipmillError, DeviceError
from engine.gate_reports import add_gate_report
from engine.registry import Registry
from jobs import embed, nightly
from jobs.bench import main
from jobs.benches import pipeline
from jobs.benches.nights import NightFigures, nights_lines
from jobs.benches.pipeline import (
    BASELINE,
    CLIPMILL,
    PipelineConfig,
    PipelineFigures,
    measure_baseline,
    measure_pipeline,
    pipeline_lines,
)
from jobs.benches.programs import Watched
from jobs.benches.repeated_images import ROWS_PER_FILE, RepeatedImages, write_images
from jobs.demo.run import CHECKPOINT_DIR
from pipelines.counts import KeyCounts
from pipelines.engines import EngineChoice
from pipelines.errors import CatalogError
from pipelines.stages import CALLS_OF_GPU_ENCODER
from tests import image_files
from tests.catalogs import scene_rows, write_rows
from tests.commands import command


def test_query_prints_the_recall_of_a_store(scene_store: Path, capsys):
    assert main(["query", "--store", str(scene_store), "-k", "1", "60", "--json"]) == 0
    to_image, to_text = json.loads(capsys.readouterr().out)
    assert (to_image["query"], to_text["query"]) == ("text", "image")
    assert to_image["num_queries"] == to_image["num_rows"] == 60
    assert to_image["recall"]["60"] == 1.0
    assert 0.5 < to_image["recall"]["1"] <= 1.0
    assert main(["query", "--store", str(scene_store)]) == 0
    assert capsys.readouterr().out.startswith("text-to-image recall @1 ")


def test_agreement_with_transformers_is_measured_row_by_row(
    tmp_path: Path, engines_dir: Path, capsys
):
    catalog_dir = write_rows(tmp_path / "catalog", scene_rows(24), num_files=2)
    options = ["agreement", "--catalog", str(catalog_dir), "--engines", str(engines_dir)]
    assert main([*options, "--rows", "20", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert [entry["modality"] for entry in measured] == ["image", "text"]
    assert [entry["num_rows"] for entry in measured] == [20, 20]
    assert all(0.9999 <= entry["minimum"] <= 1.0001 for entry in measured)


def test_decoding_is_measured(tmp_path: Path, engines_dir: Path, capsys):
    rows = [{"key": "a", "image": image_files.jpeg()}, {"key": "b", "image": image_files.png()}]
    catalog_dir = write_rows(tmp_path / "catalog", rows)
    options = ["--catalog", str(catalog_dir), "--engines", str(engines_dir), "--json"]
    assert main(["decode", *options, "--batch-sizes", "2"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["num_images"] == 2
    names = [timing["name"] for timing in figures["timings"]]
    assert names[0].startswith("Pillow on ")
    assert names[1].startswith("is it for a GPU? on ")
    assert all(timing["num_calls"] >= 5 for timing in figures["timings"])
    assert (figures["device"] is None) == (figures["cosine_p1"] is None) == (len(names) == 2)


def test_the_encode_stage_is_measured_by_itself(tmp_path: Path, engines_dir: Path, capsys):
    rows = [*scene_rows(12), {"key": "none", "image": b"no image"}]
    catalog_dir = write_rows(tmp_path / "catalog", rows, num_files=2)
    options = ["--catalog", str(catalog_dir), "--engines", str(engines_dir)]
    options += ["--batch-rows", "5", "--seconds", "0.1", "--runs", "3"]
    assert main(["stage", *options, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    check_stage(figures)
    assert (figures["backend"], figures["decoder"]) == ("onnxruntime", "cpu")
    assert (figures["num_calls"], figures["decode_per_second"]) == (1, 0)


@pytest.mark.gpu
def test_the_encode_stage_is_measured_on_a_gpu(tmp_path: Path, engines_dir: Path, capsys):
    registry = Registry(str(engines_dir))
    engine = load_or_build(
        find_checkpoint(str(CHECKPOINT_DIR)), registry=registry, precision="fp16"
    )
    add_gate_report(registry, engine.manifest.engine_id, passed=True, files={})
    photos = [
        {"key": str(seed), "image": image_files.jpeg(image_files.photo(80, 60, seed=seed))}
        for seed in range(12)
    ]
    catalog_dir = write_rows(tmp_path / "catalog", photos)
    options = ["--catalog", str(catalog_dir), "--engines", str(engines_dir)]
    options += ["--engine", engine.manifest.engine_id, "--backend", "torch"]
    options += ["--batch-rows", "5", "--seconds", "0.1", "--runs", "3"]
    assert main(["stage", *options, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    check_stage(figures)
    assert (figures["backend"], figures["decoder"]) == ("torch", "gpu")
    assert figures["num_calls"] == CALLS_OF_GPU_ENCODER
    assert figures["decode_per_second"] > 0


def check_stage(figures: dict[str, Any]) -> None:
    assert figures["batch_rows"] == 5
    lowest, median, highest = figures["all_runs"]
    assert 0 < lowest <= median == figures["images_per_second"] <= highest
    # One batch at a time, and other things beside.
    assert figures["encode_per_second"] >= lowest


def test_a_stage_needs_images(tmp_path: Path, engines_dir: Path):
    catalog_dir = write_rows(tmp_path / "catalog", [{"key": "a", "text": "a cat"}])
    options = ["--catalog", str(catalog_dir), "--engines", str(engines_dir)]
    with pytest.raises(CatalogError, match="has no image column"):
        main(["stage", *options])
    with pytest.raises(ValueError, match="num_runs=0: expected at least 1"):
        main(["stage", *options, "--runs", "0"])
    catalog_dir = write_rows(tmp_path / "nonsense", [{"key": "a", "image": b"no image"}])
    options[1] = str(catalog_dir)
    with pytest.raises(CatalogError, match="none of its images decodes"):
        main(["stage", *options])
    with pytest.raises(DeviceError, match="needs an engine that runs on GPUs"):
        main(["stage", *options, "--decode", "gpu"])


@pytest.mark.parametrize(("changed", "num_due"), [("0.1", 110), ("0", 0)])
def test_a_plan_finds_what_was_changed(changed: str, num_due: int, capsys):
    assert main(["plan", "--keys", "1000", "--changed", changed, "--json"]) == 0
    (figures,) = json.loads(capsys.readouterr().out)
    assert (figures["num_keys"], figures["num_due"], figures["num_dead"]) == (
        1000,
        num_due,
        num_due,
    )
    assert figures["seconds"] > 0
    assert figures["core_seconds"] > 0
    assert figures["peak_memory_bytes"] > 2**25
    assert main(["plan", "--keys", "1000", "--changed", changed]) == 0
    assert capsys.readouterr().out.startswith(f"1,000 keys, {num_due} due, {num_due} dead: ")


@pytest.mark.usefixtures("local_ray")
def test_nights_are_measured_by_what_changed_before_them(
    engines_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    def here(words: Sequence[str]) -> Watched:
        assert words[:3] == ["-m", "jobs.cli", "nightly"]
        done = command(nightly.main, words[3:])
        assert done.code == 0, done.err
        return Watched(report=done.json, seconds=2.0, peak_memory_bytes=1)

    monkeypatch.setattr("jobs.benches.nights.run_watched", here)
    for module in (nightly, embed):
        monkeypatch.setattr(module, "ray_cluster", lambda *_, **__: contextlib.nullcontext())
    words = ["nights", "--keys", "400", "--changed", "0.05", "--engines", str(engines_dir)]
    done = command(main, [*words, "--json"])
    assert done.code == 0, done.err
    nights = done.json
    assert [night["num_encoded"] for night in nights] == [400, 20, 0, 0]
    assert [night["plan"]["num_changed"] for night in nights] == [0, 20, 0, 0]
    # The catalog's files are other ones in the last, which the store then knows.
    assert [night["committed"] for night in nights] == [True, True, False, True]
    assert nights[0]["encoding_share"] == 1
    assert 0 < nights[1]["encoding_share"] < 1
    assert nights[2]["encoding_seconds"] == nights[3]["encoding_seconds"] == 0
    assert all(night["num_files"] > 0 and night["seconds"] > 1 for night in nights)
    shown = nights_lines([NightFigures(**{**n, "plan": KeyCounts(**n["plan"])}) for n in nights])
    assert shown[1].startswith("first ")
    assert "some rows changed: 0 new, 20 changed, 0 moved, 380 unchanged, 0 deleted" in shown


def test_a_pipeline_of_repeated_and_damaged_images_accounts_for_every_row(
    tmp_path: Path, checkpoint_dir: Path, engines_dir: Path, capsys
):
    rows = [
        {"key": str(row), "image": image_files.jpeg(image_files.photo(90, 70, seed=row))}
        for row in range(6)
    ]
    catalog_dir = write_rows(tmp_path / "catalog", rows)
    options = ["--rows", "100", "--images", str(catalog_dir), "--damaged", "0.1", "--baseline"]
    options += ["--checkpoint", str(checkpoint_dir), "--engines", str(engines_dir), "--json"]
    with pytest.raises(ValueError, match="--baseline takes no damaged images"):
        main(["pipeline", *options])
    options.remove("--baseline")
    assert main(["pipeline", *options]) == 0
    (figures,) = json.loads(capsys.readouterr().out)
    assert figures["rejects_by_reason"] == {"truncated_image": 10}
    assert (figures["num_rows"], figures["name"]) == (100, "clipmill")
    assert "-bound" in figures["bottleneck"]
    assert figures["seconds"] > 1
    assert figures["rows_per_second"] > 0
    # Ray's own processes and an encoder take more than this, a laptop has less than that.
    assert 200 * 2**20 < figures["peak_memory_bytes"] < 16 * 2**30
    assert figures["spilled_bytes"] == 0


def test_images_are_repeated_and_every_tenth_is_damaged(tmp_path: Path):
    image = image_files.jpeg()
    catalog_dir = write_rows(tmp_path / "catalog", [{"key": "a", "image": image}])
    images = RepeatedImages(catalog_uri=str(catalog_dir), damaged_share=0.1)
    write_images(tmp_path / "many", images, num_rows=ROWS_PER_FILE + 20)
    table = pq.read_table(tmp_path / "many")
    assert table["key"].to_pylist() == [f"{row:09d}" for row in range(ROWS_PER_FILE + 20)]
    contents = table["image"].to_pylist()
    damaged = [content for content in contents if content != image]
    assert len(damaged) == (ROWS_PER_FILE + 20) // 10
    half = image[: len(image) // 2]
    assert damaged[:2] == [half + b"\xff\xd9", half]
    with pytest.raises(ValueError, match=r"damaged_share=0\.6: expected 0 to 0\.5"):
        RepeatedImages(catalog_uri="x", damaged_share=0.6)


@pytest.mark.parametrize(
    ("what", "option"), [("query", "--store"), ("agreement", "--catalog"), ("decode", "--catalog")]
)
def test_what_to_measure_must_be_named(what: str, option: str, capsys):
    with pytest.raises(SystemExit) as ended:
        main([what])
    assert ended.value.code == 2
    assert f"the following arguments are required: {option}" in capsys.readouterr().err


def test_what_there_is_to_measure(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    names = (
        "encode",
        "decode",
        "pipeline",
        "plan",
        "nights",
        "index",
        "serve",
        "query",
        "agreement",
    )
    assert all(f"\n  {name} " in shown for name in names)
    assert main([]) == 0
    assert main(["speed"]) == 2
    assert "no action 'speed'" in capsys.readouterr().err


def embed_report(*, samples: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Of `clipmill embed`, of four rows."""
    stored = {"image": 4, "text": 4}
    return {
        "num_embedded": stored,
        "num_stored": stored,
        "rejects_by_reason": {},
        "bottleneck": "",
        "spilled_bytes": 7,
        "seconds": 2.0,
        "samples": samples,
    }


def test_of_several_runs_the_one_of_median_time_counts(monkeypatch: pytest.MonkeyPatch):
    runs = [
        Watched(
            report=embed_report(samples=[(0.0, 0), (1.0, 10), (2.0, 10 + steady)]),
            seconds=seconds,
            peak_memory_bytes=memory,
        )
        for seconds, steady, memory in [(9.0, 5, 1), (7.0, 8, 2), (8.0, 6, 3)]
    ]
    left: list[bool] = []

    def run_watched(words: Sequence[str]) -> Watched:
        store = Path(words[words.index("--store") + 1])
        left.append(store.exists())
        store.mkdir()
        return runs[len(left) - 1]

    monkeypatch.setattr(pipeline, "run_watched", run_watched)
    engine = EngineChoice(checkpoint="any")
    said: list[str] = []
    config = PipelineConfig(num_rows=4, engine=engine, num_runs=3)
    figures = measure_pipeline(config, on_run=said.append)
    assert said == [
        "clipmill, 4 rows, run 1 of 3: 9.0 s, 4/s, steady 5/s",
        "clipmill, 4 rows, run 2 of 3: 7.0 s, 4/s, steady 8/s",
        "clipmill, 4 rows, run 3 of 3: 8.0 s, 4/s, steady 6/s",
    ]
    assert left == [False, False, False]
    assert (figures.seconds, figures.peak_memory_bytes, figures.spilled_bytes) == (8.0, 3, 7)
    assert figures.steady_rows_per_second == 6.0
    assert figures.all_seconds == (7.0, 8.0, 9.0)
    assert figures.all_steady == (5.0, 6.0, 8.0)


def test_two_programs_are_compared_where_they_embedded_as_many_rows():
    def figures(name: str, *, rate: float, all_steady: tuple[float, ...]) -> PipelineFigures:
        return PipelineFigures(
            name=name,
            num_rows=100,
            seconds=10.0,
            all_seconds=(10.0,) * len(all_steady),
            rows_per_second=rate,
            steady_rows_per_second=all_steady[0],
            all_steady=all_steady,
            peak_memory_bytes=0,
        )

    table = pipeline_lines(
        [
            figures(CLIPMILL, rate=50.0, all_steady=(300.0, 300.0, 400.0)),
            figures(BASELINE, rate=20.0, all_steady=(60.0,)),
            figures(CLIPMILL, rate=80.0, all_steady=(300.0,)),
            figures(BASELINE, rate=20.0, all_steady=(0.0,)),
        ]
    )
    assert table[5:] == [
        "clipmill, 100 rows: 3 runs took 10.0 to 10.0 s, steady 300 to 400",
        "clipmill embeds 2.5 x as many a second as Ray Data, Pillow, transformers, of 100 rows; "
        "steady, 5.0 x",
        "clipmill embeds 4.0 x as many a second as Ray Data, Pillow, transformers, of 100 rows",
    ]


@pytest.mark.parametrize("num_runs", [0, 2])
def test_a_number_of_runs_without_a_middle_is_refused(num_runs: int):
    with pytest.raises(ValueError, match=f"num_runs={num_runs}: expected an odd number"):
        PipelineConfig(num_rows=4, engine=EngineChoice(checkpoint="any"), num_runs=num_runs)


def test_what_was_measured_is_printed_though_the_next_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def run_watched(words: Sequence[str]) -> Watched:
        if "jobs.benches.ray_baseline" in words:
            raise ClipmillError("no Ray")
        return Watched(report=embed_report(samples=[]), seconds=3.0, peak_memory_bytes=1)

    monkeypatch.setattr(pipeline, "run_watched", run_watched)
    with pytest.raises(ClipmillError, match="no Ray"):
        main(["pipeline", "--rows", "4", "--baseline", "--json"])
    (figures,) = json.loads(capsys.readouterr().out)
    assert (figures["name"], figures["seconds"]) == ("clipmill", 3.0)


def test_a_pipeline_that_leaves_rows_out_is_no_measure(monkeypatch: pytest.MonkeyPatch):
    report = {"seconds": 2.0, "samples": [(0.0, 2), (1.0, 4)]}
    watched = Watched(report=report, seconds=3.0, peak_memory_bytes=1)
    monkeypatch.setattr(pipeline, "run_watched", lambda words: watched)
    config = PipelineConfig(num_rows=4, engine=EngineChoice(checkpoint=str(CHECKPOINT_DIR)))
    with pytest.raises(ClipmillError, match="transformers embedded 4 of 8 contents"):
        measure_baseline(config)
