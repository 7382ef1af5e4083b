"""The demo from an empty folder: it retrieves, and its report has pictures."""

import contextlib
import json
from pathlib import Path

import pytest

from jobs.demo.run import main
from tests.catalogs import stored_snapshot


def test_the_demo_retrieves_scenes_that_it_never_trained_on(
    tmp_path: Path, engines_dir: Path, local_ray: None, capsys, monkeypatch: pytest.MonkeyPatch
):
    # The session's Ray stands in for the one that the command would start.
    monkeypatch.setattr("jobs.embed.ray_cluster", lambda *_, **__: contextlib.nullcontext())
    options = ["--out", str(tmp_path), "--engines", str(engines_dir), "--rows", "300", "--json"]
    assert main(options) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["report"]["num_stored"] == {"image": 300, "text": 300}
    to_image = printed["recall"][0]
    assert (to_image["query"], to_image["among"]) == ("text", "image")
    assert to_image["recall"]["10"] >= 0.98
    assert stored_snapshot(tmp_path / "store").num_rows("embeddings") == 600
    pages = sorted((tmp_path / "store" / "runs").rglob("report.html"))
    shown = pages[-1].read_text()
    assert shown.count('src="data:image/png;base64,') >= 60
    assert "expected match" in shown


def test_too_few_rows_for_the_contact_sheet_is_a_value_error(tmp_path: Path):
    with pytest.raises(ValueError, match="--rows 3: expected at least 10"):
        main(["--out", str(tmp_path), "--rows", "3"])
