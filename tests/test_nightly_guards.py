"""Nights that guards stop, and nights that are let pass: the store stays as it was, or says why."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import embed, nightly, snapshots
from pipelines.errors import GuardError
from pipelines.nightly import NightlyConfig
from pipelines.snapshots import snapshot_numbers
from pipelines.store import Store
from pipelines.writing import is_encoded
from tests.catalogs import stored_embeddings, stored_rows, stored_snapshot, write_rows
from tests.checkpoints import save_clip
from tests.commands import command
from tests.night import Night, current, due, text_rows


def is_kept(before: dict[str, tuple[bytes, int]], night: Night) -> bool:
    """Whether all files that were there are there as they were."""
    return before.items() <= night.files().items()


def test_a_half_delivered_catalog_trips_until_it_is_accepted(night: Night):
    rows, answers = text_rows(61), night.answers()
    write_rows(night.catalog_dir, [*rows[:30], rows[60]])
    before, was = night.files(), current(night)
    done = night.run()
    assert (done.code, done.out) == (1, "")
    assert "deletions: 0.5000, at most 0.2 is allowed (30 of 60 keys of snapshot 1" in done.err
    assert "Nothing was committed" in done.err
    assert "--accept deletions" in done.err
    assert current(night) == was
    assert is_kept(before, night)
    assert night.answers() == answers
    assert night.run("--accept", "drift").code == 1
    assert current(night) == was

    report = night.done("--accept", "deletions", "--accept", "drift")
    assert (report["outcome"], report["snapshot"]) == ("committed", 2)
    assert report["run"]["num_embedded"] == {"text": 0}
    assert report["lineage"]["accepted"] == ["deletions"]
    assert set(stored_embeddings(night.store_dir, modality="text")) == {
        *(row["key"] for row in rows[:30]),
        rows[60]["key"],
    }
    shown = command(snapshots.main, ["show", "--store", str(night.store_dir)]).out
    assert "keys of snapshot 1 are gone), accepted" in shown

    # The bad night is taken back: the answers are those of before, to the last bit.
    assert night.answers() != answers
    back = command(snapshots.main, ["rollback", "1", "--store", str(night.store_dir)])
    assert back.code == 0
    assert night.answers() == answers


def test_an_empty_catalog_trips_and_wipes_nothing(night: Night):
    empty = pa.schema({"key": pa.string(), "text": pa.string()})
    write_rows(night.catalog_dir, [], schema=empty)
    was = current(night)
    done = night.run()
    assert done.code == 1
    assert "deletions: 1.0000" in done.err
    assert "60 of 60 keys of snapshot 1 are gone, the catalog is empty" in done.err
    assert current(night) == was
    # `embed`, which has no guards, refuses it as ever.
    refused = command(embed.main, night.words())
    assert (refused.code, "none has a row" in refused.err) == (1, True)
    assert night.done("--accept", "deletions")["run"]["num_keys"] == 0
    assert night.answers() == [[], []]
    assert (
        "none has a row"
        in dataclasses.replace(night, store_dir=night.store_dir.parent / "fresh").run().err
    )


@pytest.fixture(scope="module")
def other_checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random weights: to it, other texts are alike."""
    return save_clip(tmp_path_factory.mktemp("other"))


@pytest.fixture
def larger_night(night: Night, tmp_path: Path) -> Night:
    """120 texts: of 60 the nearest ten are found by chance too often to say anything."""
    larger = dataclasses.replace(
        night, catalog_dir=tmp_path / "larger", store_dir=tmp_path / "of-larger"
    )
    write_rows(larger.catalog_dir, text_rows(120), num_files=2)
    larger.done()
    return larger


def test_another_engine_embeds_all_anew_beside_the_old(
    larger_night: Night, other_checkpoint_dir: Path
):
    night = larger_night
    other = ("--checkpoint", other_checkpoint_dir)
    answers, was = night.answers(), current(night)
    refused = command(embed.main, night.words(*other))
    assert refused.code == 1
    assert "or run `clipmill nightly`, which embeds all rows anew" in refused.err
    plan = night.done("--dry-run", *other)
    assert (plan["is_anew"], due(plan)) == (True, 120)

    done = night.run(*other)
    assert done.code == 1
    assert "neighbours of text: 0." in done.err
    assert "deletions" not in done.err
    assert "--accept neighbours" in done.err
    assert current(night) == was
    assert night.answers() == answers

    report = night.done(*other, "--accept", "neighbours")
    assert (report["snapshot"], report["parent"]) == (2, 1)
    assert report["run"]["num_embedded"] == {"text": 0}
    assert report["lineage"]["accepted"] == ["neighbours"]
    after = stored_snapshot(night.store_dir)
    assert {row["engine_id"] for row in stored_rows(night.store_dir)} == {after.engine.engine_id}
    assert after.engine.engine_id == plan["engine_id"] != plan["engine_before"]
    assert len(stored_embeddings(night.store_dir, modality="text")) == 120
    assert night.answers() != answers
    assert night.done(*other)["outcome"] == "unchanged"

    # Back by a rollback, or by the engine: either way nothing is embedded again.
    assert command(snapshots.main, ["rollback", "1", "--store", str(night.store_dir)]).code == 0
    assert night.answers() == answers
    assert night.done()["outcome"] == "unchanged"


def test_a_like_engine_passes_by_itself(larger_night: Night, tmp_path: Path):
    """Another resize makes another engine, but its texts are the same."""
    night = larger_night
    like = shutil.copytree(night.checkpoint_dir, tmp_path / "like")
    config = like / "preprocessor_config.json"
    config.write_text(config.read_text().replace('"resample": 3', '"resample": 2'))
    report = night.done("--checkpoint", like)
    assert report["run"]["num_embedded"] == {"text": 120}
    (found,) = [
        entry for entry in report["lineage"]["measurements"] if entry["guard"] == "neighbours"
    ]
    assert (found["value"], found["is_tripped"]) == (1.0, False)


def test_rejects_that_stop_a_night_are_let_pass_by_the_name_of_the_guard(night: Night):
    rows = text_rows(85)
    was = current(night)
    write_rows(night.catalog_dir, [*rows[:60], *({**row, "text": " "} for row in rows[60:])])
    for _ in range(2):
        done = night.run()
        assert done.code == 1
        assert "25 of 25 rows rejected" in done.err
        assert "--accept rejects" in done.err
        assert current(night) == was
    report = night.done("--accept", "rejects")
    assert report["run"]["rejects_by_reason"] == {"empty_text": 25}
    assert report["lineage"]["accepted"] == ["rejects"]


def test_rejects_that_were_let_pass_are_on_record_in_a_large_store_too(night: Night):
    """Of all its keys they are few; of what was to be done, all."""
    rows = text_rows(325)
    write_rows(night.catalog_dir, rows[:300])
    night.done()
    write_rows(night.catalog_dir, [*rows[:300], *({**row, "text": " "} for row in rows[300:])])
    assert "25 of 25 rows rejected" in night.run().err
    lineage = night.done("--accept", "rejects")["lineage"]
    assert lineage["accepted"] == ["rejects"]
    assert [
        (entry["is_tripped"], entry["detail"])
        for entry in lineage["measurements"]
        if entry["guard"] == "rejects"
    ] == [(False, "25 of 325 keys"), (True, "25 of 25 rows that were to be done")]
    # Accepted, but nothing had to be let pass.
    write_rows(night.catalog_dir, text_rows(326))
    assert night.done("--accept", "rejects")["lineage"]["accepted"] == []


def test_a_catalog_without_keys_makes_no_snapshot(night: Night, tmp_path: Path):
    keyless = dataclasses.replace(
        night, catalog_dir=tmp_path / "keyless", store_dir=tmp_path / "of-keyless"
    )
    columns = pa.schema({"key": pa.string(), "text": pa.string()})
    write_rows(keyless.catalog_dir, [{**row, "key": None} for row in text_rows(3)], schema=columns)
    done = keyless.run()
    assert done.code == 1
    assert "rejects: 1.0000, at most 0.1 is allowed (3 of 3 rows have null or" in done.err
    assert snapshot_numbers(Store(str(keyless.store_dir))) == []
    # Half of them, by a join that went wrong.
    rows = text_rows(60)
    write_rows(night.catalog_dir, [*rows, *rows])
    assert "60 of 120 rows have null or duplicate keys" in night.run().err
    assert snapshot_numbers(Store(str(night.store_dir))) == [1]


def test_what_was_encoded_is_judged_again_however_often_it_is_tried(
    night: Night, monkeypatch: pytest.MonkeyPatch
):
    """A night that a guard stopped has written old rows and new into one file: these do not count.

    Nor do copies.
    """
    rows = text_rows(62)
    rows[5] = {**rows[5], "text": rows[61]["text"]}
    write_rows(night.catalog_dir, [*rows, {"key": "copied", "text": rows[7]["text"]}])
    judged: list[Any] = []

    def noted(store: Store, candidate: Any, **_: Any) -> Any:
        judged.append(candidate)
        raise GuardError("stopped here")

    monkeypatch.setattr("pipelines.nightly.measure", noted)
    for _ in range(3):
        assert night.run().code == 1
    num_encoded = [sum(file.num_rows for file in candidate.encoded) for candidate in judged]
    assert num_encoded == [2, 2, 2]
    assert all(map(is_encoded, judged[-1].encoded))
    assert not all(map(is_encoded, judged[-1].snapshot.files))


def test_guards_are_not_turned_off_by_a_file(night: Night, tmp_path: Path):
    (tmp_path / "night.yaml").write_text("accept: [drift]\n")
    done = night.run("--config", tmp_path / "night.yaml")
    assert done.code == 2
    assert "accept is for this time, and a file would say it every time" in done.err


def test_a_guard_that_does_not_exist_is_refused(night: Night):
    options = nightly._parser().parse_options(night.words())
    config = nightly._config_from(options, command=())
    with pytest.raises(
        ValueError, match=r"accepted=\['all'\]: no such guards; expected of rejects"
    ):
        NightlyConfig(embed=config.embed, accepted=("all",))  # type: ignore[arg-type]
