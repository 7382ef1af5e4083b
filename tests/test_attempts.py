"""How often Ray began a task before, by its own count."""

import os
from pathlib import Path

import pytest
import ray

from pipelines import attempts
from pipelines.attempts import check_attempts, is_suspect, num_attempts, was_restarted
from pipelines.errors import WorkerDeathError


def test_there_are_none_outside_of_a_task(local_ray: None):
    assert num_attempts() == 0
    assert not is_suspect()
    check_attempts("work")


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


def test_a_task_of_too_many_deaths_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attempts, "num_attempts", lambda: attempts.MAX_ATTEMPTS - 1)
    check_attempts("writing 7 rows")
    monkeypatch.setattr(attempts, "num_attempts", lambda: attempts.MAX_ATTEMPTS)
    with pytest.raises(WorkerDeathError, match=r"^writing 7 rows: 6 workers died .* again$"):
        check_attempts("writing 7 rows")
