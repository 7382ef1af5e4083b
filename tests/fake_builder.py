"""The half of a made-up TensorRT 11 that builds: it writes down what it was told."""

import json
from typing import Any


class FakeBuilderApi:
    """Stands for the module `tensorrt`."""

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class NetworkDefinitionCreationFlag:
        STRONGLY_TYPED = 1

    class BuilderFlag:
        TF32, REFIT = "tf32", "refit"

    class ProfilingVerbosity:
        DETAILED = "detailed"

    class LayerInformationFormat:
        JSON = "json"

    def __init__(self, version: str = "11.4.0.106") -> None:
        self.__version__ = version
        self.configs: list[FakeConfig] = []
        self.refuses: str | None = None

    def Builder(self, logger: Any) -> Any:  # noqa: N802
        if self.refuses_to("start", logger):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return _Builder(self, logger)

    def OnnxParser(self, network: Any, logger: Any) -> Any:  # noqa: N802
        return _Parser()

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        return _Runtime(self, logger)

    def refuses_to(self, step: str, logger: Any) -> bool:
        if step == self.refuses:
            logger.log(self.ILogger.ERROR, "out of sorts")
        return step == self.refuses


class _Tensor:
    name = "pixels"


class _Network:
    num_inputs = 1

    def get_input(self, number: int) -> _Tensor:
        return _Tensor()


class _Parser:
    num_errors = 0

    def parse_from_file(self, path: str) -> bool:
        return True


class _Profile:
    def set_shape(self, name: str, smallest: Any, usual: Any, largest: Any) -> None:
        self.shapes = (smallest, usual, largest)


class _TimingCache:
    def __init__(self, known: bytes) -> None:
        self.known = known

    def serialize(self) -> bytes:
        return self.known


class FakeConfig:
    profiling_verbosity = "names only"

    def __init__(self) -> None:
        self.flags = {"tf32"}
        self.cache: _TimingCache | None = None

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profile = profile
        return 0

    def create_timing_cache(self, known: bytes) -> _TimingCache | None:
        return None if known == b"malformed" else _TimingCache(known)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        if cache.known == b"of another card" and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.cache


class _Builder:
    def __init__(self, api: FakeBuilderApi, logger: Any) -> None:
        self._api, self._logger = api, logger

    def create_network(self, flags: int) -> _Network:
        assert flags == 1 << FakeBuilderApi.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return _Network()

    def create_builder_config(self) -> FakeConfig:
        self._api.configs.append(FakeConfig())
        return self._api.configs[-1]

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: FakeConfig) -> Any:
        if self._api.refuses_to("compile", self._logger):
            return None
        if config.cache is not None:
            config.cache.known += b"timed,"
        return memoryview(b"a plan")


class _Runtime:
    def __init__(self, api: FakeBuilderApi, logger: Any) -> None:
        self._api, self._logger = api, logger

    def deserialize_cuda_engine(self, plan: Any) -> Any:
        return None if self._api.refuses_to("load", self._logger) else _Engine()


class _Engine:
    device_memory_size_v2 = 12345

    def create_engine_inspector(self) -> Any:
        return _Inspector()


class _Inspector:
    def get_engine_information(self, form: str) -> str:
        tensor = {"Name": "x", "Dimensions": [4, 768], "Format/Datatype": "FP8"}
        layer = {
            "Name": "fc1",
            "LayerType": "gemm",
            "Inputs": [tensor],
            "Outputs": [],
            "Constants": [tensor],
            "TacticName": "sm90_xmma",
            "Metadata": "[ONNX Layer: /fc1/MatMul]",
        }
        return json.dumps({"Layers": [layer]})
