"""Tests of engine/process_redaction.py: logs, warnings and errors of a process."""

import io
import logging
import re
import subprocess
import sys
import warnings

from engine.process_redaction import redact_process


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("at s3://u:s3cr3t@b")


def test_logs_hold_no_secret(monkeypatch):
    before, hook = logging.getLogRecordFactory(), sys.excepthook
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setenv("CLIPMILL_TOKEN", "s3cr3t-of-the-service")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("tests.redaction")
    logger.addHandler(handler)
    try:
        redact_process()
        redact_process()
        logger.warning("plain s3://u:s3cr3t@bucket/a")
        logger.warning("%s at %d of %.1f: %s", "s3://u:s3cr3t@b", 3, 4.5, OSError("k:s3cr3t@b"))
        logger.warning("%(uri)s", {"uri": "https://h/?sig=s3cr3t"})
        logger.warning("token is s3cr3t-of-the-service, 100%")
        logger.warning("token=%s", "s3cr3t")
        logger.warning("password: %s, %d", "s3cr3t", 7)
        logger.warning("s3://u:s3cr3t@b/%s and %d", "x", 7)
        logger.warning("%s %s", ["s3://u:s3cr3t@b"], b"s3://u:s3cr3t@b")
        logger.warning("%d of %s", "s3://u:s3cr3t@b")
        logger.warning("%d rows of %s were lost", "s3://u:s3cr3t@b/a")
        logger.warning("unprintable: %s", Unprintable())
        logger.warning(Unprintable())
        try:
            raise OSError("at https://u:s3cr3t@host/a?sig=s3cr3t")
        except OSError:
            logger.exception("it failed")
    finally:
        logger.removeHandler(handler)
        logging.setLogRecordFactory(before)
        sys.excepthook = hook
    said = stream.getvalue()
    assert "s3cr3t" not in said
    assert "WARNING s3://***@b at 3 of 4.5: ***@b" in said
    assert "token is ***, 100%" in said
    assert "OSError: at https://***@host/a?***" in said
    assert "WARNING token=***" in said
    assert "WARNING password: ***, 7" in said
    assert "WARNING s3://***@b/x and 7" in said
    assert "WARNING %d of %s ('s3://***@b',)" in said
    assert "WARNING %d rows of %s were lost ('s3://***@b/a',)" in said
    assert re.search("WARNING unprintable: %s .*Unprintable object at 0x", said)
    assert re.search("WARNING <.*Unprintable object at 0x", said)
    assert "Traceback" in said


def test_a_process_that_dies_of_a_bug_says_no_secret():
    words = (
        "from jobs.command import run\n"
        "def main(argv):\n"
        "    raise RuntimeError('at s3://AKIA:' + 's3cr' + '3t@bucket')\n"
        "run(main, [])"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert done.returncode == 1
    assert "RuntimeError: at s3://***@bucket" in done.stderr
    assert "s3cr3t" not in done.stderr


LOUD = """
import gc, threading, warnings
from engine.process_redaction import redact_process

redact_process()
redact_process()
secret = "s3cr" + "3t"

class Fragile:
    def __del__(self):
        raise RuntimeError(f"unraisable at s3://AKIA:{secret}@bucket")

def fail():
    raise RuntimeError(f"in a thread at s3://AKIA:{secret}@bucket")

thread = threading.Thread(target=fail, name="worker")
thread.start()
thread.join()
threading.Thread(target=exit).start()
Fragile()
gc.collect()
warnings.warn(f"warned: password={secret}")
"""


def test_what_a_process_writes_of_errors_and_warnings_says_no_secret():
    done = subprocess.run([sys.executable, "-c", LOUD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Exception in thread worker:\nTraceback" in done.stderr
    assert "RuntimeError: in a thread at s3://***@bucket" in done.stderr
    assert "RuntimeError: unraisable at s3://***@bucket" in done.stderr
    assert "Fragile.__del__" in done.stderr
    assert "UserWarning: warned: password=***" in done.stderr
    assert "SystemExit" not in done.stderr
    assert "s3cr3t" not in done.stderr


HALF_GONE = """
import ctypes, sys
from engine.process_redaction import redact_process

class Kind(type):
    def __getattribute__(self, name):
        sys.stderr.write("code of its kind ran")
        return super().__getattribute__(name)

class Odd(metaclass=Kind):
    def __call__(self):
        raise RuntimeError("at s3://AKIA:" + "s3cr" + "3t@bucket")

    def __getattribute__(self, name):
        sys.stderr.write("its code ran")
        return super().__getattribute__(name)

    def __repr__(self):
        sys.stderr.write("its repr ran")
        return "odd"

redact_process()
ctypes.CFUNCTYPE(None)(Odd())()
"""


def test_what_nobody_waits_for_is_said_without_asking_the_object():
    done = subprocess.run([sys.executable, "-c", HALF_GONE], capture_output=True, text=True)
    assert "callback function: <__main__.Odd object at 0x" in done.stderr
    assert "RuntimeError: at s3://***@bucket" in done.stderr
    assert " ran" not in done.stderr


def test_hooks_of_others_stay():
    words = (
        "import sys, threading\n"
        "from engine.process_redaction import redact_process\n"
        "threading.excepthook = sys.unraisablehook = print\n"
        "redact_process()\n"
        "assert threading.excepthook is sys.unraisablehook is print\n"
    )
    assert subprocess.run([sys.executable, "-c", words]).returncode == 0
