"""Whole nights on a real Ray: all of a night is seen at once, or the store stays as it was."""

import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs import embed, nightly, snapshots
from pipelines.errors import CommitConflictError, GuardError, StoreError
from pipelines.indexes.manifest import find_index
from pipelines.indexes.opening import OpenIndex
from pipelines.indexes.queries import Part, Query
from pipelines.lineage import code_version
from pipelines.nightly import NightlyConfig, run_night
from pipelines.runs.run_history import find_run
from pipelines.search import Searcher
from pipelines.snapshots import snapshot_numbers
from pipelines.store import Store
from pipelines.writing import is_encoded
from tests import image_files
from tests.catalogs import (
    scene_rows,
    stored_embeddings,
    stored_rows,
    stored_snapshot,
    write_rows,
)
from tests.checkpoints import save_clip
from tests.commands import Done, command
from tests.stages_here import use_stages_here

QUERIES = ["a small red circle", "three yellow triangles on a white background"]


@dataclasses.dataclass(frozen=True)
class Night:
    """A catalog, its store, and the command that brings the one up to the other."""

    catalog_dir: Path
    store_dir: Path
    checkpoint_dir: Path
    engines_dir: Path

    def run(self, *options: object, catalog_dir: Path | None = None) -> Done:
        return command(nightly.main, self.words(*options, catalog_dir=catalog_dir))

    def words(self, *options: object, catalog_dir: Path | None = None) -> list[str]:
        words = ["--catalog", catalog_dir or self.catalog_dir, "--store", self.store_dir]
        words += ["--engines", self.engines_dir]
        if not {"--checkpoint", "--engine"} & set(options):
            words += ["--checkpoint", self.checkpoint_dir]
        return [str(word) for word in (*words, *options)]

    def done(self, *options: object, **where: Path) -> Any:
        """Run it, with success; returns the JSON."""
        done = self.run("--json", *options, **where)
        assert done.code == 0, done.err
        return done.json

    def answers(self) -> list[list[tuple[str | int, float]]]:
        searcher = Searcher(str(self.store_dir), engines_uri=str(self.engines_dir), modality="text")
        queries = [Query(parts=(Part(text=text),)) for text in QUERIES]
        return [
            [(hit.key, hit.score) for hit in answer.hits]
            for answer in searcher.search(queries, num_hits=5)
        ]

    def files(self) -> dict[str, tuple[bytes, int]]:
        """All of the store: path -> content and time."""
        return {
            str(path.relative_to(self.store_dir)): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in self.store_dir.rglob("*")
            if path.is_file()
        }


@pytest.fixture
def night_by_ray(
    tmp_path: Path,
    checkpoint_dir: Path,
    engines_dir: Path,
    local_ray: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Night:
    """60 texts, embedded and indexed."""
    for module in (nightly, embed):
        monkeypatch.setattr(module, "ray_cluster", lambda *_, **__: contextlib.nullcontext())
    made = Night(tmp_path / "catalog", tmp_path / "store", checkpoint_dir, engines_dir)
    write_rows(made.catalog_dir, text_rows(60), num_files=2)
    first = made.done()
    assert (first["outcome"], first["snapshot"], first["parent"]) == ("committed", 1, None)
    assert (first["num_indexes_built"], first["run"]["num_embedded"]) == (1, {"text": 60})
    return made


@pytest.fixture
def night(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Night:
    """The same without Ray's workers, which takes a tenth of the time."""
    use_stages_here(monkeypatch)
    made: Night = request.getfixturevalue("night_by_ray")
    return made


def text_rows(num_rows: int) -> list[dict[str, Any]]:
    return [{"key": row["key"], "text": row["text"]} for row in scene_rows(num_rows)]


def due(plan: dict[str, Any], modality: str = "text") -> int:
    """Of a plan in JSON: keys that are to be embedded or copied."""
    keys = plan["plan"][modality]
    return sum(keys[f"num_{what}"] for what in ("new", "changed", "retried", "moved"))


def current(night: Night) -> tuple[list[int], bytes]:
    """What a reader goes by: numbers of the snapshots, and the manifest of the last."""
    store = Store(str(night.store_dir))
    numbers = snapshot_numbers(store)
    return numbers, store.read(f"snapshots/{numbers[-1]:08d}.json")


def is_kept(before: dict[str, tuple[bytes, int]], night: Night) -> bool:
    """Whether all files that were there are there as they were."""
    return before.items() <= night.files().items()


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


def test_what_cannot_be_indexed_is_refused_before_it_is_embedded(night: Night):
    """Unless all could still be rejects; rows of the store count as well as new ones."""
    write_rows(night.catalog_dir, text_rows(90))
    before = night.files()
    dim = stored_snapshot(night.store_dir).embedding_dim
    # Of 90 keys, 19 rejects would trip no guard.
    # A bit for each value, two factors and an id, and 32 centroids.
    needed = 71 * (dim // 8 + 8 + 8) + 4 * 32 * dim
    done = night.run("--max-memory-bytes", needed - 1)
    assert done.code == 1
    assert f"an index of 71 x {dim} wants {needed} at least" in done.err
    # Nothing but the record of a run that failed.
    after = night.files()
    (record,) = after.keys() - before.keys()
    assert record.startswith("runs/")
    assert {path: after[path] for path in before} == before
    done = night.run("--max-memory-bytes", needed)
    assert f"an index of 90 x {dim} wants" in done.err
    assert night.done("--dry-run")["plan"]["text"]["num_staged"] == 30
    # With an index that is there, what memory there is does not matter.
    assert night.done()["snapshot"] == 2
    assert night.done("--max-memory-bytes", 1)["outcome"] == "unchanged"


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


def test_guards_are_not_turned_off_by_a_file(night: Night, tmp_path: Path):
    (tmp_path / "night.yaml").write_text("accept: [drift]\n")
    done = night.run("--config", tmp_path / "night.yaml")
    assert done.code == 2
    assert "accept is for this time, and a file would say it every time" in done.err


def test_an_index_that_is_missing_is_built(night: Night):
    answers = night.answers()
    shutil.rmtree(night.store_dir / "indexes")
    was = current(night)
    done = night.run()
    assert (done.code, current(night)) == (0, was)
    assert "indexes: 1 built, 1 there" in done.out
    assert night.answers() == answers


def test_the_index_is_there_before_the_commit(night: Night, monkeypatch: pytest.MonkeyPatch):
    write_rows(night.catalog_dir, text_rows(61))
    seen = []

    def noted(store: Store, snapshot) -> None:
        seen.append(find_index(store, snapshot, modality="text"))
        raise CommitConflictError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.committing.commit", noted)
        assert night.run().code == 1
    assert seen[0] is not None
    report = night.done()
    assert (report["num_indexes_built"], report["run"]["num_embedded"]) == (0, {"text": 0})


def finds_nothing(
    _: OpenIndex, vectors: np.ndarray, *, num_hits: int, **__: Any
) -> tuple[np.ndarray, np.ndarray]:
    shape = (len(vectors), num_hits)
    return np.full(shape, -np.inf), np.full(shape, -1)


def promoted(night: Night) -> list[Path]:
    return sorted((night.store_dir / "indexes").glob("*/manifest.json"))


def test_an_index_with_faults_is_not_promoted(night: Night, monkeypatch: pytest.MonkeyPatch):
    write_rows(night.catalog_dir, text_rows(61))
    was, served = current(night), promoted(night)
    with monkeypatch.context() as patch:
        patch.setattr(OpenIndex, "search", finds_nothing)
        for _ in range(2):
            done = night.run()
            assert (done.code, current(night)) == (1, was)
            assert "recall of text: 0.0000, at least 0.95 is allowed" in done.err
            assert promoted(night) == served
    assert night.done()["snapshot"] == 2
    assert len(promoted(night)) == 2


def test_an_index_with_faults_that_is_accepted_is_promoted(
    night: Night, monkeypatch: pytest.MonkeyPatch
):
    write_rows(night.catalog_dir, text_rows(61))
    with monkeypatch.context() as patch:
        patch.setattr(OpenIndex, "search", finds_nothing)
        report = night.done("--accept", "recall")
    assert report["lineage"]["accepted"] == ["recall"]
    assert len(promoted(night)) == 2


def test_an_index_with_faults_is_not_put_in_the_place_of_a_missing_one(
    night: Night, monkeypatch: pytest.MonkeyPatch
):
    shutil.rmtree(night.store_dir / "indexes")
    with monkeypatch.context() as patch:
        patch.setattr(OpenIndex, "search", finds_nothing)
        done = night.run()
        assert done.code == 1
        assert "Snapshot 1 is current, and stays without this index" in done.err
    assert promoted(night) == []
    assert "indexes: 1 built, 1 there" in night.run().out


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


def test_a_guard_that_does_not_exist_is_refused(night: Night):
    options = nightly._parser().parse_options(night.words())
    config = nightly._config_from(options, command=())
    with pytest.raises(
        ValueError, match=r"accepted=\['all'\]: no such guards; expected of rejects"
    ):
        NightlyConfig(embed=config.embed, accepted=("all",))  # type: ignore[arg-type]
