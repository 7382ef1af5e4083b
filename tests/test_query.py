"""`clipmill query` as a person or a script calls it."""

import json
from pathlib import Path

import pytest

from jobs.query import main
from tests.catalogs import scene_rows


def test_text_and_image_give_keys_and_scores(
    scene_store: Path, engines_dir: Path, tmp_path: Path, capsys
):
    common = ["--store", str(scene_store), "--engines", str(engines_dir)]
    row = scene_rows(60)[11]
    picture = tmp_path / "picture.png"
    picture.write_bytes(row["image"])
    assert main([*common, "--image", str(picture), "-k", "2", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert [set(hit) for hit in hits] == [{"key", "score"}] * 2
    assert hits[0]["key"] == row["key"]
    assert main([*common, "--text", row["text"], "-k", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.split()[1].startswith("k") for line in lines)


def test_a_missing_picture_is_said(scene_store: Path, engines_dir: Path, tmp_path: Path):
    options = ["--store", str(scene_store), "--engines", str(engines_dir)]
    with pytest.raises(ValueError, match=r"nothing\.jpg: No such file"):
        main([*options, "--image", str(tmp_path / "nothing.jpg")])


def test_either_text_or_image_is_needed(scene_store: Path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--store", str(scene_store)])
    assert stopped.value.code == 2
    assert "one of the arguments --text --image is required" in capsys.readouterr().err
