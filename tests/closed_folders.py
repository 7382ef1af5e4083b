"""Folders that may not be listed, also by root, whom a disk lets list all."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest


def close(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let nobody list it until the patch is undone."""
    scandir = os.scandir

    def refusing(path: Any = ".") -> Any:
        if Path(os.fsdecode(path)) == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    patch.setattr(os, "scandir", refusing)
