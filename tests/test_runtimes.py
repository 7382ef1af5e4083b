"""Finding TensorRT, and keeping what it says."""

import sys
from types import ModuleType
from typing import Any

import pytest

from engine.errors import DeviceError
from engine.plans.runtimes import MessageLog, installed_library
from tests.fake_tensorrt import forget_libraries

NAMES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts modules in the place of all TensorRTs."""

    def put(**versions: str) -> None:
        forget_libraries(monkeypatch)
        for name in NAMES:
            monkeypatch.setitem(sys.modules, name, None)
        for name, version in versions.items():
            module: Any = ModuleType(name)
            module.__version__ = version
            module.ILogger = type("ILogger", (), {"INTERNAL_ERROR": 0, "ERROR": 1, "INFO": 3})
            monkeypatch.setitem(sys.modules, name, module)

    return put


def test_tensorrt_comes_first(install: Any) -> None:
    install(tensorrt="10.13.3.9", tensorrt_rtx="1.7.1.116")
    library = installed_library()
    assert (library.flavour, library.version) == ("tensorrt", "10.13.3.9")
    assert library.major_version == 10
    assert library.api is sys.modules["tensorrt"]
    assert installed_library("tensorrt") is library
    assert installed_library("tensorrt_rtx").version == "1.7.1.116"


@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt_rtx_bindings"])
def test_rtx_under_either_name(install: Any, name: str) -> None:
    install(**{name: "1.7.1.116"})
    library = installed_library()
    assert (library.flavour, library.version) == ("tensorrt_rtx", "1.7.1.116")
    assert library.api is sys.modules[name]


def test_none_is_installed(install: Any) -> None:
    install()
    with pytest.raises(DeviceError, match=r"no TensorRT here: pip install 'clipmill\[gpu\]'"):
        installed_library()
    with pytest.raises(DeviceError, match=r"no tensorrt_rtx here: pip install 'clipmill\[rtx\]'"):
        installed_library("tensorrt_rtx")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("import its_libs", "tensorrt is installed, but not whole: No module named 'its_libs'"),
        ("raise ImportError('no libnvinfer.so.10')", r"cannot be loaded \(no libnvinfer.so.10\)"),
        ("raise OSError('no libnvinfer.so.10')", r"cannot be loaded \(no libnvinfer.so.10\)"),
    ],
)
def test_a_broken_installation_is_said(
    install: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, content: str, text: str
) -> None:
    install()
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "tensorrt.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DeviceError, match=text):
        installed_library()


def test_what_a_library_says_is_kept_not_printed(
    install: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    install(tensorrt="11.4.0.106")
    library = installed_library()
    severity = library.api.ILogger
    library.logger.log(severity.ERROR, "an old error")
    with library.log.recording() as messages:
        library.logger.log(severity.INFO, "all is well")
        library.logger.log(severity.ERROR, "out of memory")
        library.logger.log(severity.INTERNAL_ERROR, "assertion failed")
        library.logger.log(severity.ERROR, "out of memory")
    library.logger.log(severity.INFO, "nobody listens")
    assert messages == ["all is well", "out of memory", "assertion failed", "out of memory"]
    assert library.log.errors == "out of memory; assertion failed"
    assert capfd.readouterr() == ("", "")


def test_errors_of_an_operation() -> None:
    log = MessageLog()
    assert log.errors == "it gave no reason"
    for number in range(100):
        log.add_error(f"error {number}")
    assert log.errors.startswith("error 80; ")  # the last twenty
    log.begin()
    assert log.errors == "it gave no reason"


def test_the_real_thing(capfd: pytest.CaptureFixture[str]) -> None:
    library = installed_library("tensorrt_rtx")
    assert library.version.count(".") == 3
    with library.log.recording() as messages:
        assert library.api.Builder(library.logger).create_network() is not None
        library.logger.log(library.api.ILogger.ERROR, "an error")
    assert messages[-1] == "an error"
    assert capfd.readouterr() == ("", "")
