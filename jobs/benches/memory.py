"""How much memory processes take while something is measured.

Knows nothing of what they do.
"""

import threading
from typing import Self

import psutil

SAMPLE_SECONDS = 0.5


class MemoryWatch(threading.Thread):
    """Samples the memory of a process and all its children; use as a context.

    Proportional set size, so that pages that processes share count once.
    """

    def __init__(self, pid: int) -> None:
        """Watch a process by its id."""
        super().__init__(name="memory-watch", daemon=True)
        self._root = psutil.Process(pid)
        self._stopped = threading.Event()
        self.peak_bytes = 0
        """Most of it that was seen."""

    def __enter__(self) -> Self:
        """Begin."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End with a last look."""
        self._stopped.set()
        self.join()
        self.peak_bytes = max(self.peak_bytes, self._now())

    def run(self) -> None:
        """Look again and again."""
        while not self._stopped.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, self._now())

    def _now(self) -> int:
        total = 0
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0
        for process in processes:
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue  # it ended between listing and reading
        return total
