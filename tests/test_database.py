"""The scratch database: dropped at the end, and what is said where it has no room."""

import errno
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.database import scratch_database, sql_type
from pipelines.errors import ScratchSpaceError
from pipelines.ledger import Ledger


@pytest.fixture
def scratch_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def fill(db) -> None:
    """Put more into a database than it has room for."""
    db.execute("SET memory_limit = '20MiB'; SET max_temp_directory_size = '1MiB'")
    db.execute("CREATE TABLE t AS SELECT range AS n, hash(range) AS h FROM range(10_000_000)")


def test_it_is_gone_at_the_end(scratch_dir: Path) -> None:
    with scratch_database() as db:
        assert db.sql("SELECT 1").fetchall() == [(1,)]
        assert len(list(scratch_dir.iterdir())) == 1
    assert list(scratch_dir.iterdir()) == []


def test_a_full_disk_is_named_with_the_way_out(scratch_dir: Path) -> None:
    message = f"{scratch_dir}/clipmill-.*: no room for what does not fit .*TMPDIR"
    with pytest.raises(ScratchSpaceError, match=message), scratch_database() as db:
        fill(db)
    assert list(scratch_dir.iterdir()) == []
    with (
        pytest.raises(ScratchSpaceError, match=message),
        Ledger(key_type=pa.int64(), modalities=["text"]) as ledger,
    ):
        fill(ledger._db)
    assert list(scratch_dir.iterdir()) == []


def test_a_disk_without_room_for_a_folder(
    scratch_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(ScratchSpaceError, match="No space left on device"), scratch_database():
        pass


def test_other_errors_are_left_as_they_are(scratch_dir: Path) -> None:
    with pytest.raises(KeyError), scratch_database():
        raise KeyError
    assert list(scratch_dir.iterdir()) == []


def test_keys_are_numbers_or_words() -> None:
    assert [sql_type(pa.int64()), sql_type("int64"), sql_type("string")] == [
        *("BIGINT", "BIGINT", "VARCHAR")
    ]
