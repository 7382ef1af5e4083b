"""Counts of the stages on a real Ray, and how they are shown."""

import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest
import ray

from jobs import progress
from jobs.logs import event_log
from jobs.progress import (
    LOG_SECONDS,
    bar_total,
    progress_line,
    shown_progress,
    shown_steps,
    stage_total,
)
from pipelines.counts import Counts, KeyCounts
from pipelines.progress import (
    GPU_STAGES,
    STAGES,
    Progress,
    ProgressBoard,
    StageCount,
    StageMeter,
    metered,
    polled,
)
from tests.meters import ListMeter
from tests.waiting import wait_until


def key_counts(*, num_new: int = 10, num_moved: int = 0, num_twins: int = 0) -> KeyCounts:
    return KeyCounts(
        num_new=num_new,
        num_changed=30,
        num_retried=10,
        num_moved=num_moved,
        num_unchanged=30,
        num_staged=5,
        num_deleted=3,
        num_twins=num_twins,
    )


# 50 images and 60 texts to be encoded.
COUNTS = Counts(
    num_rows=100,
    num_keys=90,
    num_due_rows=70,
    keys={"image": key_counts(num_moved=7), "text": key_counts(num_new=25, num_twins=5)},
)


@pytest.fixture
def board(local_ray: None):
    made = ProgressBoard.remote()
    yield made
    ray.kill(made)


def test_a_board_whose_process_is_killed_starts_again_from_nothing(board):
    ray.get(board.add.remote("encode", 5, 0, 1.0))
    process = psutil.Process(ray.get(board.__ray_call__.remote(lambda board: os.getpid())))
    process.kill()
    process.wait()
    ray.get(board.add.remote("encode", 3, 0, 1.0))
    assert ray.get(board.progress.remote()).stages["encode"].num_rows == 3


def test_meters_add_up_across_workers(board):
    @ray.remote(num_cpus=0.1)
    def work(meter: StageMeter) -> None:
        for _ in range(3):
            with meter.batch() as size:
                size(10, 1_000)

    ray.get([work.remote(StageMeter(board, stage="decode")) for _ in range(2)])
    wait_until(lambda: ray.get(board.progress.remote()).stages["decode"].num_rows >= 60)
    counted = ray.get(board.progress.remote())
    assert counted.stages["decode"].num_bytes == 6_000
    assert 0 < counted.stages["decode"].busy_seconds < 120
    assert counted.stages["encode"] == StageCount()


def test_a_meter_tells_cores_from_waiting(board):
    @ray.remote(num_cpus=0.1)
    def work(meter: StageMeter) -> None:
        with meter.batch() as size:
            time.sleep(0.3)
            started = time.process_time()
            while time.process_time() - started < 0.2:
                pass
            size(1, 0)

    ray.get(work.remote(StageMeter(board, stage="encode")))
    wait_until(lambda: ray.get(board.progress.remote()).stages["encode"].num_rows >= 1)
    counted = ray.get(board.progress.remote()).stages["encode"]
    assert 0.2 <= counted.core_seconds <= counted.busy_seconds - 0.2


def test_seconds_of_batches_side_by_side_count_once(board):
    meter = StageMeter(board, stage="encode")

    def work(delay: float, seconds: float, error: Exception | None) -> None:
        time.sleep(delay)
        with suppress(RuntimeError), meter.batch() as size:
            time.sleep(seconds)
            if error is not None:
                raise error
            size(1, 0)

    started = time.perf_counter()
    with ThreadPoolExecutor(4) as threads:
        # One within another, one that fails, and one that ends last; then, alone, another.
        works = [(0, 0.6, None), (0.2, 0.2, None), (0.1, 0.2, RuntimeError()), (0.4, 0.4, None)]
        list(threads.map(work, *zip(*works, strict=True)))
    time.sleep(0.5)
    work(0, 0.2, None)
    seconds = time.perf_counter() - started
    wait_until(lambda: ray.get(board.progress.remote()).stages["encode"].num_rows >= 4)
    counted = ray.get(board.progress.remote()).stages["encode"]
    assert 1.0 <= counted.busy_seconds <= seconds - 0.5
    assert counted.core_seconds <= counted.busy_seconds


def test_a_batch_that_fails_is_not_counted(board):
    meter = StageMeter(board, stage="encode")
    with pytest.raises(RuntimeError), meter.batch():
        raise RuntimeError
    assert ray.get(board.progress.remote()).stages["encode"].num_rows == 0


def test_what_is_metered_counts_where_there_is_a_meter():
    meter = ListMeter()
    with metered(meter) as size:
        size(10, 1_000)
        size(20, 2_000)
    with metered(None) as size:
        size(30, 3_000)
    with pytest.raises(RuntimeError), metered(meter):
        raise RuntimeError
    with pytest.raises(RuntimeError), metered(None):
        raise RuntimeError
    assert meter.batches == [(20, 2_000)]


def test_progress_is_handed_over_from_another_thread_and_at_the_end(board):
    seen: list[tuple[str, int]] = []

    def on_progress(progress: Progress) -> None:
        name = threading.current_thread().name
        seen.append((name, progress.stages["encode"].num_rows))

    with polled(board, on_progress):
        ray.get(board.add.remote("encode", 7, 0, 0.1))
        wait_until(lambda: seen)
    assert seen[0][0] == "progress"
    assert seen[-1] == ("MainThread", 7)
    with polled(board, None):
        pass


def make_progress(*, seconds: float, num_encoded: int) -> Progress:
    stages = {stage: StageCount() for stage in STAGES}
    stages["encode"].num_rows = num_encoded
    return Progress(seconds=seconds, stages=stages)


def test_a_log_line_has_rate_and_time_left():
    line = progress_line(COUNTS, make_progress(seconds=10, num_encoded=20))
    assert line == ("10 s: read 0, decode 0, encode 20, write 0 of 110 rows; 2.0 rows/s, 45 s left")
    assert "time left unknown" in progress_line(COUNTS, make_progress(seconds=1, num_encoded=0))


def test_totals_count_rows_to_read_and_then_modalities():
    assert stage_total(COUNTS, "read") == 70
    assert stage_total(COUNTS, "write") == 110


def test_nobody_knows_how_many_images_are_left_to_gpus():
    assert bar_total(COUNTS, "decode", stages=STAGES) == 110
    assert bar_total(COUNTS, "decode", stages=GPU_STAGES) is None
    assert bar_total(COUNTS, "prepare", stages=GPU_STAGES) == 110


def test_a_board_counts_the_stages_that_there_are(local_ray: None):
    board = ProgressBoard.remote(GPU_STAGES)
    ray.get(board.add.remote("prepare", 5, 0, 0.1))
    progress = ray.get(board.progress.remote())
    assert list(progress.stages) == list(GPU_STAGES)
    assert progress_line(COUNTS, progress).split(": ", 1)[1].startswith("read 0, prepare 5, decode")


def test_a_log_gets_a_line_now_and_then(capsys):
    with event_log("embed"), shown_progress() as show:
        for seconds in (1, 20, 31, 45, 62):
            show(COUNTS, make_progress(seconds=seconds, num_encoded=seconds))
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["seconds"] for event in events] == [31, 62]
    assert [event["message"].split(" s:")[0] for event in events] == ["31", "62"]
    assert events[0]["event"] == "progress"
    assert events[0]["rows"] == {"read": 0, "decode": 0, "encode": 31, "write": 0}
    assert events[0]["total_rows"] == 110


def test_a_log_gets_a_line_for_each_stage_and_another_now_and_then(
    capsys, monkeypatch: pytest.MonkeyPatch
):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    with event_log("engine build"), shown_steps() as show:
        for seconds, step in (
            (0, ("calibrate", 0, 32)),
            (1, ("calibrate", 1, 32)),
            (LOG_SECONDS - 1, ("calibrate", 9, 32)),
            (LOG_SECONDS + 1, ("calibrate", 10, 32)),
            (LOG_SECONDS + 2, ("calibrate", 32, 32)),
            (LOG_SECONDS + 3, ("judge", 0, 0)),
            (LOG_SECONDS + 4, ("calibrate", 0, 16)),
        ):
            clock.seconds = 1_000 + seconds
            show(*step)
    shown = capsys.readouterr()
    assert shown.out == ""
    events = [json.loads(line) for line in shown.err.splitlines()]
    assert [event["message"] for event in events] == [
        "calibrate 0 of 32",
        "calibrate 10 of 32",
        "judge",
        "calibrate 0 of 16",
    ]
    assert [(event["stage"], event["done"], event["total"]) for event in events[:2]] == [
        ("calibrate", 0, 32),
        ("calibrate", 10, 32),
    ]


class Clock:
    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def terminal(capsys, monkeypatch: pytest.MonkeyPatch):
    """What is written, as if stderr were a terminal."""
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("COLUMNS", "100")):
        monkeypatch.setenv(name, value)
    return capsys


def bars(shown: str) -> list[str]:
    """What a terminal shows in the end: a line for each bar, without colours and the bar itself."""
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown)
    lines = [line for line in re.split(r"[\r\n]+", plain) if line.strip()]
    stages = list(dict.fromkeys(line.split()[0] for line in lines))
    last = {line.split()[0]: line for line in lines}
    return [re.sub("[\u2501\u2578\u257a ]+", " ", last[stage]).strip() for stage in stages]


def test_a_terminal_gets_a_bar_for_each_stage(terminal):
    with shown_steps() as show:
        for done in range(5):
            show("calibrate", done, 4)
        show("judge", 0, 0)
        show("export", 0, 1)
        show("export", 1, 1)
        show("reference", 64, 256)
    shown = terminal.readouterr()
    assert shown.out == ""
    calibrate, judge, export, reference = bars(shown.err)
    assert calibrate.startswith("calibrate 4/4 0:0")
    # One that does not count is done when the next begins.
    assert judge.startswith("judge 1/1 0:0")
    assert export.startswith("export 1/1 0:0")
    assert reference.startswith("reference 64/256 0:0")


def test_a_terminal_shows_no_total_of_what_does_not_count(terminal):
    with shown_steps() as show:
        show("compile", 0, 0)
    (compile_,) = bars(terminal.readouterr().err)
    assert compile_.startswith("compile 0/? 0:0")


def test_bars_end_with_an_error(terminal):
    def fail() -> None:
        with shown_steps() as show:
            show("calibrate", 3, 4)
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        fail()
    shown = terminal.readouterr().err
    assert bars(shown)[0].startswith("calibrate 3/4")
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l"), "the cursor is shown again"
