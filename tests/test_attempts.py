"""How often Ray began a task before, by its own count, and what its workers died of."""

import os
import re
from pathlib import Path

import pytest
import ray

from pipelines.errors import WorkerDeathError
from pipelines.progress import ProgressBoard, StageMeter
from pipelines.resilience import attempts
from pipelines.resilience.attempts import (
    MAX_ATTEMPTS,
    MAX_DEATHS,
    MAX_LOST_NODES,
    MAX_NOTED_ATTEMPTS,
    SUSPECT_ATTEMPTS,
    attempted,
    check_deaths,
    is_suspect,
    num_attempts,
    was_restarted,
)
from tests.meters import ListMeter


@pytest.fixture
def meter(local_ray: None):
    board = ProgressBoard.remote()
    yield StageMeter(board, stage="encode")
    ray.kill(board)


def test_there_are_none_outside_of_a_task(local_ray: None):
    assert num_attempts() == 0
    assert not is_suspect()
    with attempted("work", meter=None):
        pass


def test_a_task_knows_how_often_it_was_begun(local_ray: None, tmp_path: Path):
    @ray.remote(max_retries=-1, num_cpus=0.5)
    def begun_three_times(log: str) -> tuple[int, bool]:
        with open(log, "a") as file:
            file.write(f"{num_attempts()} {is_suspect()}\n")
        if num_attempts() < 2:
            os._exit(1)
        return num_attempts(), is_suspect()

    log = tmp_path / "log"
    assert ray.get(begun_three_times.remote(str(log))) == (2, True)
    assert log.read_text().splitlines() == ["0 False", "1 False", "2 True"]


def test_an_actor_knows_that_it_took_the_place_of_another(local_ray: None):
    @ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0.5)
    class Actor:
        def __init__(self) -> None:
            self.is_second = was_restarted()

        def is_second_after_a_death(self) -> bool:
            if not self.is_second:
                os._exit(1)
            return self.is_second

    assert ray.get(Actor.remote().is_second_after_a_death.remote())


def test_work_that_is_the_end_of_each_worker_is_an_error(meter: StageMeter, tmp_path: Path):
    @ray.remote(max_retries=-1, num_cpus=0.5)
    def deadly(log: str, meter: StageMeter) -> None:
        # In pieces, of which the first does no harm: the second is blamed, and by its own count.
        with attempted("the first piece", meter=meter):
            pass
        with attempted("the second piece", meter=meter):
            with open(log, "a") as file:
                file.write("x")
            os._exit(1)

    log = tmp_path / "log"
    died = f"{MAX_DEATHS} workers died of it that did nothing else meanwhile"
    with pytest.raises(WorkerDeathError, match=f"the second piece: {died}"):
        ray.get(deadly.remote(str(log), meter))
    assert len(log.read_text()) == SUSPECT_ATTEMPTS + MAX_DEATHS


def test_workers_that_die_between_pieces_do_so_a_number_of_times(
    monkeypatch: pytest.MonkeyPatch, meter: StageMeter
):
    monkeypatch.setattr(attempts, "num_attempts", lambda: MAX_NOTED_ATTEMPTS - 1)
    with attempted("work", meter=meter):
        pass
    monkeypatch.setattr(attempts, "num_attempts", lambda: MAX_NOTED_ATTEMPTS)
    said = f"^work: {MAX_NOTED_ATTEMPTS} workers died"
    with pytest.raises(WorkerDeathError, match=said), attempted("work", meter=meter):
        pass


def test_the_board_forgets_what_ended(meter: StageMeter):
    assert meter.begin("a", node_id="here") == []
    assert meter.begin("a", node_id="there") == ["here"]
    assert meter.begin("b", node_id="here") == []
    meter.end("a")
    assert meter.begin("a", node_id="here") == []
    assert meter.begin("b", node_id="here") == ["here"]
    meter.end("c")


def test_an_error_within_is_an_end(monkeypatch: pytest.MonkeyPatch, meter: StageMeter):
    monkeypatch.setattr(attempts, "num_attempts", lambda: SUSPECT_ATTEMPTS)
    for _ in range(2 * MAX_DEATHS):
        with pytest.raises(ValueError, match="an ordinary one"), attempted("work", meter=meter):
            raise ValueError("an ordinary one")


def test_deaths_count_and_lost_nodes_do_not_count_as_deaths():
    here, gone = "here", "gone"
    check_deaths("work", begun_on=[here] * (MAX_DEATHS - 1), alive={here})
    check_deaths("work", begun_on=[gone] * (MAX_LOST_NODES - 1), alive={here})
    # One that was thought to be there when the work was begun again may be known as gone later.
    both = [here] * (MAX_DEATHS - 1) + [gone] * (MAX_LOST_NODES - 1)
    check_deaths("work", begun_on=both, alive={here})
    with pytest.raises(WorkerDeathError, match=rf"^work: {MAX_DEATHS} workers died .* Ray \(out"):
        check_deaths("work", begun_on=[here, *both], alive={here})
    with pytest.raises(WorkerDeathError, match=rf"^work: {MAX_LOST_NODES} nodes were lost .* why"):
        check_deaths("work", begun_on=[gone, *both], alive={here})


def test_without_a_board_the_count_of_ray_has_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attempts, "num_attempts", lambda: MAX_ATTEMPTS - 1)
    with attempted("reading", meter=None):
        pass
    monkeypatch.setattr(attempts, "num_attempts", lambda: MAX_ATTEMPTS)
    said = re.escape(f"reading: {MAX_ATTEMPTS} workers died while they were at it, or their nodes")
    with pytest.raises(WorkerDeathError, match=f"^{said}"), attempted("reading", meter=None):
        pass


def test_work_that_nobody_suspects_is_not_told_to_the_board():
    # A meter without one.
    with attempted("work", meter=ListMeter()):  # type: ignore[arg-type]
        pass
