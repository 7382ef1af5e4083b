"""What a submitted job runs: its command, whose stdout is marked line by line.

Knows nothing of who reads it. A job has one log for stdout and stderr; by the mark the reader
parts them again.
"""

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TextIO

from jobs.command import run

STDOUT_MARK = "clipmill stdout| "


class MarkedLines(io.TextIOBase):
    """A text stream that passes whole lines on, each behind the mark."""

    def __init__(self, stream: TextIO) -> None:
        """Begin with nothing written."""
        self._stream = stream
        self._begun = ""

    def writable(self) -> bool:
        """That it is."""
        return True

    def write(self, text: str) -> int:
        """Pass on the lines that are whole, keep the rest."""
        *whole, self._begun = (self._begun + text).split("\n")
        if whole:
            # At once: other processes write to the same log.
            self._stream.write("".join(f"{STDOUT_MARK}{line}\n" for line in whole))
            self._stream.flush()
        return len(text)

    def end(self) -> None:
        """Pass on what was begun."""
        if self._begun:
            self.write("\n")


@contextmanager
def marked_stdout() -> Iterator[None]:
    """Mark what is printed to stdout within a block."""
    lines = MarkedLines(sys.stdout)
    with redirect_stdout(lines):
        try:
            yield
        finally:
            lines.end()


def main() -> None:
    """Run the command of the folder that the job was started in; exits with its code."""
    # Only a submitted job has it; not imported where this module's mark is read.
    from jobs import cli
    from jobs.submission.packing import WORDS_PATH

    words = json.loads((Path.cwd() / WORDS_PATH).read_text(encoding="utf-8"))
    with marked_stdout():
        run(cli.main, words)


if __name__ == "__main__":
    main()
