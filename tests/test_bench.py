"""`clipmill bench`: figures that are measured, and options that must be given."""

import json
from pathlib import Path

import pytest

from jobs.bench import main
from jobs.benches.pipeline import measure_pipeline
from tests.catalogs import scene_rows, write_rows


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


def test_the_pipeline_is_measured_in_a_process_of_its_own(
    checkpoint_dir: Path, engines_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CLIPMILL_ENGINES", str(engines_dir))
    figures = measure_pipeline(48, checkpoint=str(checkpoint_dir))
    assert figures.num_rows == 48
    assert figures.seconds > 1
    assert figures.rows_per_second > 0
    # Ray's own processes and an encoder take more than this, a laptop has less than that.
    assert 200 * 2**20 < figures.peak_memory_bytes < 16 * 2**30


@pytest.mark.parametrize(("what", "option"), [("query", "--store"), ("agreement", "--catalog")])
def test_what_to_measure_must_be_named(what: str, option: str, capsys):
    with pytest.raises(SystemExit) as ended:
        main([what])
    assert ended.value.code == 2
    assert f"the following arguments are required: {option}" in capsys.readouterr().err


def test_what_there_is_to_measure(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in ("encode", "pipeline", "query", "agreement"))
    assert main([]) == 0
    assert main(["speed"]) == 2
    assert "no action 'speed'" in capsys.readouterr().err
