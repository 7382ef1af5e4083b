"""One compiled tower, loaded by its TensorRT: contexts that are bound to a shape and to addresses.

Knows the differences between versions of TensorRT, and nothing of batches, streams or copies.
"""

from typing import Any

from engine.errors import DeviceError, DeviceMemoryError, PlanError
from engine.plans.plan import Shape
from engine.plans.runtimes import Library


class _Contexts8:
    """How TensorRT 8.6 makes contexts."""

    def __init__(self, api: Any, engine: Any) -> None:
        self._engine = engine
        self.memory_bytes = int(engine.device_memory_size)

    def create(self) -> Any:
        return self._engine.create_execution_context_without_device_memory()

    def give_memory(self, context: Any, address: int) -> None:
        context.device_memory = address

    def can_capture(self, context: Any, stream: Any) -> bool:
        return True


class _Contexts10:
    """How TensorRT 10.13 to 11 makes contexts."""

    def __init__(self, api: Any, engine: Any) -> None:
        self._engine = engine
        self._strategy = api.ExecutionContextAllocationStrategy.USER_MANAGED
        self.memory_bytes = int(engine.device_memory_size_v2)

    def create(self) -> Any:
        return self._engine.create_execution_context(self._strategy)

    def give_memory(self, context: Any, address: int) -> None:
        context.set_device_memory(address, self.memory_bytes)

    def can_capture(self, context: Any, stream: Any) -> bool:
        return True


class _ContextsRtx:
    """How TensorRT for RTX makes contexts; it compiles kernels for the card as it does."""

    def __init__(self, api: Any, engine: Any) -> None:
        self._engine = engine
        self.memory_bytes = int(engine.device_memory_size_v2)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            api.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        # Lazily, a shape would run on other kernels at first, whose results differ in the last bit.
        config.dynamic_shapes_kernel_specialization_strategy = (
            api.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        # Kernels are compiled once for all contexts.
        config.set_runtime_cache(config.create_runtime_cache())
        self._config = config

    def create(self) -> Any:
        return self._engine.create_execution_context(self._config)

    def give_memory(self, context: Any, address: int) -> None:
        context.set_device_memory(address, self.memory_bytes)

    def can_capture(self, context: Any, stream: Any) -> bool:
        return bool(context.is_stream_capturable(int(stream)))


class LoadedTower:
    """A compiled tower on the GPU."""

    def __init__(self, plan: bytes, *, name: str, library: Library) -> None:
        """Load a plan.

        Args:
            plan: The file's content.
            name: For the texts of errors.
            library: That compiled it.

        Raises:
            PlanError: The library refuses it.
            DeviceMemoryError: The GPU has too little free memory.
        """
        self._name = name
        self._library = library
        api = library.api
        library.log.begin()
        try:
            self._runtime = api.Runtime(library.logger)
        except TypeError as error:  # what the binding makes of a null pointer
            raise DeviceError(
                f"{library.flavour} {library.version} does not start: {library.log.errors}"
            ) from error
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._refused("cannot load it", PlanError)
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        is_input = [engine.get_tensor_mode(each) == api.TensorIOMode.INPUT for each in names]
        if is_input not in ([True, False], [False, True]):
            raise PlanError(f"{name}: expected one input and one output, it has {names}")
        self._input, self._output = names if is_input[0] else reversed(names)
        self.input_dtype = api.nptype(engine.get_tensor_dtype(self._input))
        """Of the rows that it takes, as a numpy type."""
        self.embedding_dim = int(tuple(engine.get_tensor_shape(self._output))[-1])
        """Of the float32 [N, D] that it gives."""
        self._contexts: _Contexts8 | _Contexts10 | _ContextsRtx
        if library.flavour == "tensorrt_rtx":
            self._contexts = _ContextsRtx(api, engine)
        elif library.major_version >= 10:
            self._contexts = _Contexts10(api, engine)
        else:
            self._contexts = _Contexts8(api, engine)

    def unload(self) -> None:
        """Give the GPU's memory back, once all contexts are gone."""
        del self._contexts, self._runtime

    @property
    def memory_bytes(self) -> int:
        """Scratch memory that a running context needs; contexts that take turns can share it."""
        return self._contexts.memory_bytes

    def context(self, shape: Shape, *, source: int, target: int, memory: int) -> Any:
        """A context for one shape.

        Args:
            shape: Of the input.
            source: Address of the input.
            target: Address of the output.
            memory: Address of `memory_bytes` scratch bytes.

        Raises:
            DeviceError: The library refuses it.
            DeviceMemoryError: The GPU has too little free memory.
        """
        self._library.log.begin()
        context = self._contexts.create()
        if context is None:
            raise self._refused("cannot create an execution context", DeviceError)
        # Ranges for profilers are named per layer otherwise, at every launch.
        context.nvtx_verbosity = self._library.api.ProfilingVerbosity.NONE
        self._contexts.give_memory(context, memory)
        if not (
            context.set_input_shape(self._input, shape)
            and context.set_tensor_address(self._input, source)
            and context.set_tensor_address(self._output, target)
        ):
            raise self._refused(f"refuses an input of {list(shape)}", DeviceError)
        return context

    def enqueue(self, context: Any, stream: Any) -> None:
        """Enqueue one run of a context; DeviceError if it does not start."""
        self._library.log.begin()
        if not context.execute_async_v3(int(stream)):
            raise self._refused("cannot run it", DeviceError)

    def enqueue_for_capture(self, context: Any, stream: Any) -> bool:
        """Enqueue one run of a context on a stream that is being captured."""
        return bool(context.execute_async_v3(int(stream)))

    def can_capture(self, context: Any, stream: Any) -> bool:
        """Whether the library lets a context's run be captured."""
        return self._contexts.can_capture(context, stream)

    def _refused(self, what: str, kind: type[PlanError] | type[DeviceError]) -> Exception:
        library, said = self._library, self._library.log.errors
        text = f"{self._name}: {library.flavour} {library.version} {what} ({said})"
        if "out of memory" in said.lower().replace("outofmemory", "out of memory"):
            return DeviceMemoryError(f"{text}; use a plan with fewer rows at a time")
        return kind(text)
