"""Whole nights on a real Ray: all of a night is seen at once, or the store stays as it was."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import nightly, snapshots
from pipelines.errors import StoreError
from pipelines.lineage import code_version
from pipelines.nightly import run_night
from pipelines.runs.run_history import find_run
from pipelines.store import Store
from tests import image_files
from tests.catalogs import stored_embeddings, stored_rows, stored_snapshot, write_rows
from tests.commands import command
from tests.night import Night, current, due, text_rows


def test_an_unchanged_night_does_nothing_and_says_so(night: Night):
    before = night.files()
    done = night.run()
    assert done.code == 0
    assert done.out == (
        "nothing to do: snapshot 1 is that of the catalog; indexes: 0 built, 1 there\n"
    )
    assert night.files() == before
    report = night.done()
    assert (report["outcome"], report["snapshot"], report["report_path"]) == ("unchanged", 1, None)
    assert report["num_indexes_built"] == 0


def test_a_damaged_index_is_built_again_by_a_night_without_changes(night: Night):
    (path,) = night.store_dir.glob("indexes/*/*/index.faiss")
    content = path.read_bytes()
    path.write_bytes(content[:100])
    done = night.run()
    assert done.code == 0
    assert done.out.startswith(
        "nothing to embed: snapshot 1 is that of the catalog; indexes: 1 built, 1 there\n"
    )
    assert path.read_bytes() == content


def test_a_night_embeds_what_changed_and_says_how_it_came_about(night: Night):
    rows = text_rows(62)
    changed = [*rows[:5], {**rows[5], "text": rows[4]["text"]}, *rows[6:10], *rows[12:]]
    write_rows(night.catalog_dir, changed, num_files=3)
    before = stored_embeddings(night.store_dir, modality="text")
    report = night.done()
    assert (report["outcome"], report["snapshot"], report["parent"]) == ("committed", 2, 1)
    assert report["run"]["num_embedded"] == {"text": 2}
    assert report["run"]["num_copied"] == {"text": 1}
    after = stored_embeddings(night.store_dir, modality="text")
    assert set(after) == {row["key"] for row in changed}
    assert np.allclose(after["k0005"], before["k0004"], atol=1e-6)
    assert Path(report["report_path"]).exists()
    assert night.answers()[0][0][0] in after

    lineage = stored_snapshot(night.store_dir).lineage
    assert lineage is not None
    assert {name: keys.num_due for name, keys in lineage.plan.items()} == {"text": 3}
    assert lineage.plan["text"].num_unchanged == 57
    assert lineage.command == ("clipmill", "nightly", *night.words("--json"))
    assert lineage.code_version == code_version()
    assert lineage.accepted == ()
    assert [measurement.guard for measurement in lineage.measurements] == [
        *("rejects", "deletions", "norms", "recall")
    ]
    assert not any(measurement.is_tripped for measurement in lineage.measurements)
    shown = command(snapshots.main, ["show", "--store", str(night.store_dir)]).out
    assert "  plan     text: 2 new, 0 changed, 1 moved, 57 unchanged, 2 deleted\n" in shown
    assert f"  code     Clipmill {code_version()}\n" in shown
    assert f"  command  clipmill nightly --catalog {night.catalog_dir} " in shown
    assert (
        "  guard    deletions: 0.0333, at most 0.2 is allowed (2 of 60 keys of snapshot 1" in shown
    )


def test_secrets_of_a_command_line_are_not_written(night: Night):
    write_rows(night.catalog_dir, text_rows(61))
    options = nightly._parser().parse_options(night.words())
    config = nightly._config_from(options, command=("nightly", "s3://AKIA:s3cr3t@bucket?s3cr3t"))
    run_night(config)
    assert stored_snapshot(night.store_dir).lineage.command == ("nightly", "s3://***@bucket?***")
    assert not any(b"s3cr3t" in content for content, _ in night.files().values())


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(night: Night):
    rows = text_rows(64)
    write_rows(night.catalog_dir, rows[3:])
    before = night.files()
    plan = night.done("--dry-run")
    assert night.files() == before
    assert (plan["outcome"], plan["snapshot"], plan["is_anew"]) == ("planned", 1, False)
    assert (plan["num_keys"], plan["num_keys_before"]) == (61, 60)
    assert (due(plan), plan["plan"]["text"]["num_unchanged"]) == (4, 57)
    said = night.run("--dry-run").out
    assert "text    4 new, 0 changed, 0 moved, 57 unchanged, 3 deleted" in said
    assert night.done()["run"]["num_embedded"] == {"text": due(plan)}


def test_rejects_are_tried_again_when_asked_for(night_by_ray: Night, tmp_path: Path):
    night = night_by_ray
    pictures = {name: tmp_path / f"{name}.png" for name in ("late", "mended", "there", "never")}
    for name in ("mended", "there"):
        pictures[name].write_bytes(image_files.png())
    pictures["mended"].write_bytes(b"not an image")
    rows = [{"key": name, "image": str(path)} for name, path in pictures.items()]
    catalog_dir = write_rows(tmp_path / "pictures", [*rows, {"key": "null", "image": None}])
    night = dataclasses.replace(night, catalog_dir=catalog_dir, store_dir=tmp_path / "of-pictures")

    def rejects() -> dict[str, str]:
        return {row["key"]: row["reason"] for row in stored_rows(night.store_dir, kind="rejects")}

    expected = {"late": "fetch_failed", "never": "fetch_failed", "mended": "not_an_image"}
    allow = ("--fetch-allow", tmp_path)
    night.done(*allow)
    assert rejects() == {**expected, "null": "null_image"}
    for name in ("late", "mended"):
        pictures[name].write_bytes(image_files.png())
    assert night.done(*allow)["outcome"] == "unchanged"
    report = night.done("--retry-rejects", *allow)
    assert report["outcome"] == "committed"
    assert report["run"]["num_embedded"] == {"image": 2}
    assert due(report["lineage"], "image") == 3, "the null is none that another try heals"
    assert rejects() == {"never": "fetch_failed", "null": "null_image"}
    assert night.done(*allow)["outcome"] == "unchanged"
    before = current(night)
    said = night.run("--retry-rejects", *allow).out
    assert "nothing changed: 1 rejects were tried again, all in vain; snapshot 2 stays" in said
    assert current(night) == before
    tried = find_run(Store(str(night.store_dir)), None)
    assert (tried.status, tried.numbers.num_rejected, tried.snapshot) == ("unchanged", 1, None)
    assert f"report: {night.store_dir}/runs/{tried.run_id}/report.html" in said


def test_a_night_that_was_rolled_back_comes_back_without_embedding_anew(night: Night):
    """Its files are of this very catalog; who does not want them mends the catalog."""
    write_rows(night.catalog_dir, text_rows(70)[5:])
    assert night.done()["run"]["num_embedded"] == {"text": 10}
    answers, bad = night.answers(), stored_embeddings(night.store_dir, modality="text")
    assert command(snapshots.main, ["rollback", "1", "--store", str(night.store_dir)]).code == 0
    report = night.done()
    assert (report["snapshot"], report["run"]["num_embedded"]) == (4, {"text": 0})
    after = stored_embeddings(night.store_dir, modality="text")
    assert after.keys() == bad.keys()
    assert all(np.array_equal(after[key], bad[key]) for key in bad)
    assert night.answers() == answers


def test_a_night_whose_report_cannot_be_saved_is_a_night(
    night: Night, monkeypatch: pytest.MonkeyPatch
):
    write_rows(night.catalog_dir, text_rows(61))
    publish = Store.publish

    def full(self: Store, relative: str, content: bytes) -> None:
        if relative.startswith("runs/"):
            raise StoreError("no space left")
        publish(self, relative, content)

    monkeypatch.setattr(Store, "publish", full)
    done = night.run("--json")
    assert done.code == 0
    assert (done.json["outcome"], done.json["snapshot"]) == ("committed", 2)
    assert done.json["report_path"] is None
    assert "snapshot 2 is committed; only its report is missing: no space left" in done.err
    write_rows(night.catalog_dir, text_rows(62))
    assert "report: could not be saved" in night.run().out


def test_of_two_nights_at_once_one_commits_and_the_other_goes_on(
    night: Night, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_rows(night.catalog_dir, text_rows(80))
    half = write_rows(tmp_path / "half", text_rows(70))
    inner: list[Any] = []
    from pipelines.nightly import measure_index

    def meanwhile(*args: Any, **options: Any) -> Any:
        if not inner:
            inner.append(None)
            inner[0] = night.done(catalog_dir=half)
        return measure_index(*args, **options)

    monkeypatch.setattr("pipelines.nightly.measure_index", meanwhile)
    done = night.run()
    assert done.code == 1
    assert "another run committed it first. Nothing was lost; run the same command" in done.err
    assert (inner[0]["snapshot"], inner[0]["run"]["num_embedded"]) == (2, {"text": 10})
    assert stored_snapshot(night.store_dir).catalog.num_keys == 70
    report = night.done()
    assert (report["snapshot"], report["run"]["num_embedded"]) == (3, {"text": 0})
    assert len(stored_embeddings(night.store_dir, modality="text")) == 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--accept", "everything"], "invalid choice: 'everything'"),
        (["--max-deletions", "2"], "max_deletions=2.0: expected 0 to 1"),
        (["--max-memory-bytes", "0"], "max_memory_bytes=0: expected at least 1"),
        (["--max-memory-bytes", "-5"], "max_memory_bytes=-5: expected at least 1"),
        (["--retry", "bad_luck"], "no such reasons"),
    ],
)
def test_a_bad_option_is_a_usage_error(night: Night, options: list[str], message: str):
    done = night.run(*options)
    assert done.code == 2
    assert message in done.err
