"""Real processes that die of real rows: which are blamed, what is kept of the others."""

import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from pipelines.errors import WorkerDeathError
from pipelines.resilience import isolation
from pipelines.resilience.isolated_process import DONE, FAILED, packed
from pipelines.resilience.isolation import Isolated, IsolatedStage
from tests import deadly, loud
from tests.waiting import WAIT_SECONDS

DIED = f"was killed by {deadly.DEADLY_SIGNAL.name}"
ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 128 * 2**20


def isolated_stage(
    load: Callable[[], Any] = deadly.doubled, *, max_bytes: int = MAX_BYTES
) -> IsolatedStage:
    return IsolatedStage(load, control=deadly.control_rows, max_bytes=max_bytes, called="doubling")


@pytest.fixture
def stage() -> Iterator[IsolatedStage]:
    with isolated_stage() as made:
        yield made


def table_of(texts: Sequence[str]) -> pa.Table:
    """Rows 0, 1, ..., within a longer table, of which nothing else must be seen."""
    texts = ["die", *texts, "die"]
    whole = pa.table({"text": texts, "number": [row - 1 for row in range(len(texts))]})
    return whole.slice(1, len(texts) - 2)


def numbers(isolated: Isolated) -> list[int]:
    return [number for part in isolated.parts for number in part["number"].to_pylist()]


def pids(isolated: Isolated) -> set[int]:
    return {pid for part in isolated.parts for pid in part["pid"].to_pylist()}


def test_rows_that_do_no_harm_are_done_at_once_by_one_process(stage: IsolatedStage):
    first, second = stage(table_of(["a", "b", "c"])), stage(table_of(["d"]))
    assert [part.num_rows for part in first.parts] == [3]
    assert (numbers(first), numbers(second)) == ([0, 2, 4], [0])
    assert first.poison == second.poison == {}
    (pid,) = pids(first) | pids(second)
    assert pid != os.getpid()
    stage.close()
    assert not psutil.pid_exists(pid)
    assert pids(stage(table_of(["e"]))) != {pid}


def test_the_rows_that_kill_are_found_and_the_others_done(stage: IsolatedStage):
    isolated = stage(table_of(["a", "die", "b", "exit", "lose", "c"]))
    assert isolated.poison == {
        1: DIED,
        3: "ended with 7",
        4: "lost the GPU: no such address on this card",
    }
    assert numbers(isolated) == [0, 4, 10]


@pytest.mark.parametrize("word", ["twice", "often-killed"])
def test_deaths_that_may_have_come_from_outside_are_no_rows_fault(
    stage: IsolatedStage, tmp_path: Path, word: str
):
    """The table's and one of its own; or three of its own, by the kernel."""
    isolated = stage(table_of([f"{word} {tmp_path / 'deaths'}", "b"]))
    assert (numbers(isolated), isolated.poison) == ([0, 2], {})


def test_a_row_at_which_the_kernel_comes_each_time_is_blamed(stage: IsolatedStage):
    isolated = stage(table_of(["be-killed", "b"]))
    assert (numbers(isolated), isolated.poison) == ([2], {0: "was killed by SIGKILL"})


def test_it_ends_when_the_one_who_asks_is_gone(tmp_path: Path):
    """Also in the middle of a call."""
    program = (
        "import pyarrow as pa; from pipelines.resilience.isolation import IsolatedStage;"
        "from tests import deadly;"
        "stage = IsolatedStage(deadly.doubled, control=deadly.control_rows, max_bytes=2**30,"
        " called='doubling');"
        "table = pa.table({'text': ['a'], 'number': [1]});"
        "print(stage(table).parts[0]['pid'][0].as_py(), flush=True);"
        "stage(pa.table({'text': ['sleep'], 'number': [1]}))"
    )
    asking = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    with asking:
        assert asking.stdout is not None
        process = psutil.Process(int(asking.stdout.readline()))
        asking.kill()
    process.wait(timeout=WAIT_SECONDS)


@pytest.mark.gpu
def test_a_row_that_loses_a_real_gpu_is_found():
    """The row at which a process first uses a GPU also pays for its context."""
    with isolated_stage(max_bytes=4 * 2**30) as stage:
        isolated = stage(table_of(["a", "fault", "b"]))
    assert numbers(isolated) == [0, 4]
    assert list(isolated.poison) == [1]
    assert re.match(r"lost the GPU: GPU 0 .*CUDA error: device-side assert", isolated.poison[1])


def test_control_rows_are_done_one_at_a_time():
    """As suspects are."""

    def control(schema: pa.Schema) -> pa.Table:
        return pa.concat_tables([deadly.control_rows(schema)] * 3)

    with IsolatedStage(
        deadly.dies_of_several_rows, control=control, max_bytes=MAX_BYTES, called="each"
    ) as stage:
        isolated = stage(table_of(["a", "b"]))
    assert ([part["number"].to_pylist() for part in isolated.parts], isolated.poison) == (
        [[0], [1]],
        {},
    )


def test_a_table_of_one_row_that_kills(stage: IsolatedStage):
    assert stage(table_of(["die"])) == Isolated(parts=[], poison={0: DIED})


def test_a_death_that_happens_once_is_no_rows_fault(stage: IsolatedStage, tmp_path: Path):
    isolated = stage(table_of(["a", f"once {tmp_path / 'all'}", "b"]))
    assert (numbers(isolated), isolated.poison) == ([0, 2, 4], {})
    # Nor one as the rows are done one by one: `die` is the end of the whole table.
    isolated = stage(table_of(["a", "die", "b", f"once {tmp_path / 'one'}"]))
    assert (numbers(isolated), list(isolated.poison)) == ([0, 4, 6], [1])


def test_a_row_that_takes_more_memory_than_a_row_may_is_stopped(stage: IsolatedStage):
    isolated = stage(table_of(["a", "fill", "b"]))
    assert numbers(isolated) == [0, 4]
    assert list(isolated.poison) == [1]
    assert re.fullmatch(r"took [\d,]+ MiB of memory, above 128", isolated.poison[1])


def test_what_a_row_may_take_is_beside_what_was_there_before():
    """An engine may take more than a row, which is no fault of the rows."""
    with isolated_stage(partial(deadly.loads_much, 2 * MAX_BYTES)) as stage:
        isolated = stage(table_of(["a", "fill", "b"]))
    assert (numbers(isolated), list(isolated.poison)) == ([0, 4], [1])


def test_an_error_is_raised_here_and_blames_no_row(stage: IsolatedStage):
    with pytest.raises(ValueError, match=r"^an ordinary error$"):
        stage(table_of(["a", "fail"]))
    assert numbers(stage(table_of(["a"]))) == [0]


def test_a_row_after_which_no_other_is_survived_is_not_blamed(tmp_path: Path):
    """Nor is one of those after it: a machine that breaks breaks at some row."""
    load = partial(deadly.breaks, str(tmp_path / "broken"))
    with (
        isolated_stage(load) as stage,
        pytest.raises(WorkerDeathError, match="does not survive rows that are harmless"),
    ):
        stage(table_of(["a", "die", "b"]))


def test_rows_come_in_order_with_rejects_in_their_places():
    parts = [pa.table({"number": [number]}) for number in (2, 6)]
    isolated = Isolated(parts=parts, poison={0: "died", 2: "died", 4: "died"})
    rejects = pa.table({"number": [-1, -2, -3]})
    assert isolated.joined(rejects)["number"].to_pylist() == [-1, 2, -2, 6, -3]
    whole = Isolated(parts=[pa.table({"number": [0, 2]})], poison={})
    assert whole.joined(None)["number"].to_pylist() == [0, 2]


def test_what_its_process_writes_of_an_error_says_no_secret():
    here, there = multiprocessing.Pipe()
    words = [sys.executable, "-m", "pipelines.resilience.isolated_process", str(there.fileno())]
    with here, there:
        process = subprocess.Popen(
            words, pass_fds=[there.fileno()], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        here.send_bytes(pickle.dumps(partial(loud.failing_stage, "s3cr3t")))
        assert here.recv_bytes() == DONE
        here.send_bytes(packed(table_of(["a"])))
        assert here.recv_bytes()[:1] == FAILED
        _, said = process.communicate()
    assert "RuntimeError: a stage at s3://***@bucket/a" in said
    assert "s3cr3t" not in said


def test_where_row_after_row_kills_it_is_hardly_the_rows(
    stage: IsolatedStage, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(isolation, "MAX_POISON_IN_A_ROW", 3)
    isolated = stage(table_of(["exit", "exit", "a", "exit", "exit"]))
    assert len(isolated.poison) == 4
    with pytest.raises(WorkerDeathError, match=r"doubling died of 3 rows .*ended with 7.*kept"):
        stage(table_of(["exit"]))


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        (
            deadly.dies_as_it_loads,
            WorkerDeathError,
            "doubling cannot be started: its process was killed by SIGSEGV, and 2 before it ended",
        ),
        (
            partial(deadly.doubled, factor=None),
            TypeError,
            "unsupported operand",
        ),
        (
            deadly.dies_of_all_rows,
            WorkerDeathError,
            "doubling does not survive rows that are harmless: its process ended with 9, and 2 "
            "before it ended too. It is not the rows",
        ),
        (deadly.fails_as_it_loads, ValueError, "nothing to load"),
    ],
)
def test_what_cannot_be_loaded_is_an_error(
    load: Callable[[], Any], error: type[Exception], message: str
):
    with (
        isolated_stage(load) as stage,
        pytest.raises(error, match=message),
    ):
        stage(table_of(["a"]))


def test_a_start_that_fails_once_is_tried_again(tmp_path: Path):
    load = partial(deadly.dies_at_first, str(tmp_path / "started"))
    with isolated_stage(load) as stage:
        assert numbers(stage(table_of(["a", "b"]))) == [0, 2]
