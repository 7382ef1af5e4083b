"""Functions of tables that end their process when they see certain rows."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa

from engine.errors import DeviceLostError

# A library's fault, of which Ray's workers do not write pages as of SIGSEGV.
DEADLY_SIGNAL = signal.SIGSYS
_DEATHS = {
    "once": (1, DEADLY_SIGNAL),
    "twice": (2, DEADLY_SIGNAL),
    "often-killed": (4, signal.SIGKILL),
}


def act_on(texts: list[str | None]) -> None:
    """Do what a text says.

    `die`, `be-killed` as from outside, `exit`, `lose` the GPU, `fault` on a real one, `fail`,
    `sleep`, `fill` memory, or what ends with time: `once PATH` and `twice PATH` die so often,
    `often-killed PATH` is killed four times.

    Args:
        texts: Others do nothing.
    """
    for text in texts:
        word, _, path = (text or "").partition(" ")
        if word == "die":
            os.kill(os.getpid(), DEADLY_SIGNAL)
        elif word == "be-killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "exit":
            os._exit(7)
        elif word == "lose":
            raise DeviceLostError("no such address on this card")
        elif word == "fault":
            _fault()
        elif word == "fail":
            raise ValueError("an ordinary error")
        elif word == "sleep":
            time.sleep(600)
        elif word == "fill":
            _fill_memory()
        elif word in _DEATHS:
            num_deaths, by = _DEATHS[word]
            if _num_deaths(path) < num_deaths:
                with open(path, "a") as deaths:
                    deaths.write("x")
                os.kill(os.getpid(), by)


def _num_deaths(path: str) -> int:
    return Path(path).stat().st_size if Path(path).exists() else 0


def _fault() -> None:
    """Reads what is not there, on the card: from then on no call to it succeeds."""
    import torch

    from engine.backends.torch_device import typed_errors

    device = torch.device("cuda", 0)
    with typed_errors(device):
        torch.zeros(1, device=device)[torch.tensor([7], device=device)].cpu()


def _fill_memory() -> None:
    """More than is allowed, and not all that the machine has."""
    _held.extend(b"x" * 2**24 for _ in range(64))
    time.sleep(600)


def doubled(*, factor: int | None = 2) -> partial:
    """Loads `double`."""
    return partial(double, factor=factor)


def control_rows(schema: pa.Schema) -> pa.Table:
    """Harmless to `double`."""
    return pa.table({"text": ["control"], "number": [0]}, schema=schema)


def double(table: pa.Table, *, factor: int) -> pa.Table:
    """Multiplies `number`, unless a row's `text` says otherwise."""
    act_on(table["text"].to_pylist())
    numbers = [factor * number for number in table["number"].to_pylist()]
    return pa.table({"number": numbers, "pid": [os.getpid()] * len(numbers)})


def dies_of_several_rows() -> Callable[[pa.Table], pa.Table]:
    """Loads what takes one row at a time."""
    return _exit_of_several


def _exit_of_several(table: pa.Table) -> pa.Table:
    if table.num_rows > 1:
        os._exit(7)
    return table


def dies_as_it_loads() -> partial:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def dies_of_all_rows() -> Callable[[pa.Table], pa.Table]:
    return _die


def _die(table: pa.Table) -> pa.Table:
    os._exit(9)


def breaks(path: str) -> partial:
    """Loads `double` on a machine that breaks at a row that kills, for good."""
    return partial(_double_or_break, path=path)


def _double_or_break(table: pa.Table, *, path: str) -> pa.Table:
    texts = table["text"].to_pylist()
    if "die" in texts:
        Path(path).touch()
    if Path(path).exists():
        os.kill(os.getpid(), DEADLY_SIGNAL)
    return double(table, factor=2)


def loads_much(num_bytes: int) -> partial:
    """Loads `double`, and takes memory."""
    _held.append(b"x" * num_bytes)
    return doubled()


_held: list[bytes] = []


def dies_at_first(path: str) -> partial:
    """Loads `double` the second time."""
    act_on([f"once {path}"])
    return doubled()


def fails_as_it_loads() -> partial:
    raise ValueError("nothing to load")
