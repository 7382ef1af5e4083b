"""One context and one CUDA graph for each slot and shape, on a GPU and a TensorRT made up."""

from contextlib import ExitStack

import numpy as np
import pytest

from engine.backends.execution import LoadedTower
from engine.backends.launches import Launches
from engine.backends.overlap import Pipeline, Slot
from engine.device import Device
from engine.errors import DeviceError
from engine.plans.plan import Shape
from engine.plans.runtimes import Library, MessageLog, _logger
from tests.fake_gpu import FakeCuda
from tests.fake_tensorrt import FakeTensorrt, FakeTensorrtRtx, expected_embeddings, plan_bytes

MAX_ROWS, MAX_LENGTH, DIM = 4, 32, 16


class Texts:
    """A loaded tower whose launches a test can see."""

    def __init__(self, api: FakeTensorrt, *, max_graphs: int = 9, num_slots: int = 3) -> None:
        self.api = api
        self.cuda = api.cuda
        self.log = MessageLog()
        library = Library(
            flavour="tensorrt_rtx" if isinstance(api, FakeTensorrtRtx) else "tensorrt",
            version=api.__version__,
            api=api,
            log=self.log,
            logger=_logger(api, self.log),
        )
        plan = plan_bytes(
            input_name="token_ids", dim=DIM, min_shape=(1, 8), max_shape=(MAX_ROWS, MAX_LENGTH)
        )
        self.resources = ExitStack()
        device = Device(api.cuda)
        loaded = LoadedTower(plan, name="text.plan", library=library)
        self.resources.callback(loaded.unload)
        self.pipeline = Pipeline(
            device,
            num_slots=num_slots,
            input_bytes=MAX_ROWS * MAX_LENGTH * 4,
            output_bytes=MAX_ROWS * DIM * 4,
            resources=self.resources,
        )
        memory = device.allocate(loaded.memory_bytes)
        self.resources.callback(device.free, memory)
        self.launches = Launches(
            loaded,
            memory=memory,
            device=device,
            stream=self.pipeline.stream,
            max_graphs=max_graphs,
        )
        self.resources.callback(self.launches.clear)
        self.resources.callback(self.pipeline.close)

    def check(self, shapes: list[Shape]) -> None:
        """Run batches of these shapes; their results must be right."""
        batches = [
            np.random.default_rng(number).integers(0, 600, shape, dtype=np.int32)
            for number, shape in enumerate(shapes)
        ]
        results = self.pipeline.run(batches, self.compute)
        for token_ids, result in zip(batches, results, strict=True):
            np.testing.assert_array_equal(
                result.view(np.float32).reshape(-1, DIM), expected_embeddings(token_ids, DIM)
            )

    def compute(self, slot: Slot, shape: Shape) -> int:
        self.launches.enqueue(slot, shape)
        return shape[0] * DIM * 4


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


def test_captured_at_the_first_run_and_replayed_after_it(cuda: FakeCuda) -> None:
    texts = Texts(FakeTensorrt(cuda))
    texts.check([(4, 8)] * 10)
    assert cuda.live()["graphs"] == 3  # one for each slot
    assert cuda.calls["cudaGraphLaunch"] == 10 - 3
    texts.check([(4, 8)] * 10)
    assert cuda.calls["cudaStreamBeginCapture"] == 3
    assert cuda.calls["cudaGraphLaunch"] == 20 - 3
    texts.check([(4, 16), (3, 8)])
    assert cuda.live()["graphs"] == 5
    texts.resources.close()
    assert cuda.live() == {}


def test_without_graphs(cuda: FakeCuda) -> None:
    texts = Texts(FakeTensorrt(cuda), max_graphs=0)
    texts.check([(4, 8)] * 10)
    assert texts.api.shapes == [(4, 8)] * 3
    assert cuda.calls["cudaStreamBeginCapture"] == 0


def test_the_least_recently_used_goes(cuda: FakeCuda) -> None:
    texts = Texts(FakeTensorrt(cuda), max_graphs=2, num_slots=1)
    a, b, c = (4, 8), (4, 16), (4, 24)
    texts.check([a, b, a, c, a, b])
    assert texts.api.shapes == [a, b, c, b]
    assert cuda.live()["graphs"] == 2


def test_a_graph_that_runs_is_not_dropped(cuda: FakeCuda) -> None:
    texts = Texts(FakeTensorrt(cuda), max_graphs=1)
    texts.check([(4, 8)])
    texts.check([(4, 8)] * 3)  # a replay in the first slot, then another takes its place
    assert cuda.calls["cudaGraphLaunch"] == 1


def test_rtx_is_asked_first(cuda: FakeCuda) -> None:
    api = FakeTensorrtRtx(cuda)
    api.capturable = False
    Texts(api).check([(4, 8)] * 9)
    assert cuda.calls["cudaStreamBeginCapture"] == 0
    api.capturable = True
    Texts(api).check([(4, 8)] * 9)
    assert cuda.calls["cudaStreamBeginCapture"] == 3


@pytest.mark.parametrize("who", ["CUDA", "TensorRT"])
def test_what_cannot_be_captured_is_enqueued_each_time(cuda: FakeCuda, who: str) -> None:
    texts = Texts(FakeTensorrt(cuda))
    if who == "CUDA":
        cuda.fail("cudaStreamEndCapture", "cudaErrorStreamCaptureInvalidated", after=1)
    else:
        texts.api.refuses = "capture"
    for _ in range(2):
        texts.check([(4, 8)] * 9)
    assert cuda.calls["cudaStreamBeginCapture"] == 3  # and not tried again
    assert cuda.live().get("graphs", 0) == (2 if who == "CUDA" else 0)


def test_too_little_memory_for_a_graph_does_without_it(cuda: FakeCuda) -> None:
    texts = Texts(FakeTensorrt(cuda), num_slots=1)
    cuda.fail("cudaGraphInstantiate", "cudaErrorMemoryAllocation")
    for _ in range(2):
        texts.check([(4, 8)] * 3)
    assert texts.api.shapes == [(4, 8)]  # the context, in use, is kept
    assert cuda.live().get("graphs", 0) == 0


def test_a_shape_beyond_the_plan_is_refused(cuda: FakeCuda) -> None:
    with pytest.raises(DeviceError, match=r"text.plan: tensorrt 11.* refuses an input of \[4, 4\]"):
        Texts(FakeTensorrt(cuda)).check([(4, 4)])
