"""Whether the TensorRTs that can be looked at here have what the backend asks of them.

That they do it right is tested on a GPU.
"""

from typing import Any

import pytest
import tensorrt_lean_bindings as lean
import tensorrt_rtx_bindings as rtx

from engine.backends import execution
from tests import fake_tensorrt
from tests.bindings import misuses


def objects_of(api: Any) -> dict[str, Any]:
    return {
        "api": api,
        "self._library.api": api,
        "self._runtime": api.Runtime,
        "engine": api.ICudaEngine,
        "self._engine": api.ICudaEngine,
        "context": api.IExecutionContext,
        "config": api.IRuntimeConfig,
    }


@pytest.mark.parametrize(
    ("api", "contexts", "typical"),
    [
        (lean, execution._Contexts10, "create_execution_context"),
        (rtx, execution._ContextsRtx, "is_stream_capturable"),
    ],
)
def test_the_bindings_have_what_is_used(api: Any, contexts: type, typical: str) -> None:
    used, wrong = misuses(contexts, objects_of(api))
    assert not wrong
    assert {typical, "device_memory_size_v2", "set_device_memory", "USER_MANAGED"} <= used
    used, wrong = misuses(execution.LoadedTower, objects_of(api))
    assert not wrong
    assert {
        "Runtime",
        "deserialize_cuda_engine",
        "get_tensor_mode",
        "INPUT",
        "set_input_shape",
        "set_tensor_address",
        "execute_async_v3",
    } <= used


def test_the_check_sees_what_is_missing() -> None:
    _, wrong = misuses(execution._ContextsRtx, objects_of(lean))
    assert "context.is_stream_capturable does not exist" in wrong
    _, wrong = misuses(execution._Contexts8, objects_of(lean))
    assert "engine.device_memory_size does not exist" in wrong
    assert "self._engine.create_execution_context_without_device_memory does not exist" in wrong


@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (fake_tensorrt._Engine10, lean.ICudaEngine),
        (fake_tensorrt._Context10, lean.IExecutionContext),
        (fake_tensorrt._Runtime, lean.Runtime),
        (fake_tensorrt._EngineRtx, rtx.ICudaEngine),
        (fake_tensorrt._ContextRtx, rtx.IExecutionContext),
        (fake_tensorrt._RuntimeConfig, rtx.IRuntimeConfig),
    ],
)
def test_the_made_up_tensorrt_promises_no_more(fake: type, real: Any) -> None:
    own = {name for name in dir(fake) if not name.startswith("_")} - {"strategy", "cache"}
    assert own
    assert own <= set(dir(real))


def test_the_check_sees_a_wrong_number_of_arguments() -> None:
    def give_memory(context: Any) -> None:
        context.set_device_memory(1)

    _, wrong = misuses(give_memory, objects_of(lean))
    assert wrong == ["context.set_device_memory does not take 1 arguments"]
