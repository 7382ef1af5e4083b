"""Products that are added to what is there: on a GPU, and how calls to cuBLASLt fail."""

import ctypes
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.backends import sum_product
from engine.backends.sum_product import Algorithm, SumProduct
from engine.errors import DeviceError
from engine.quantization.fp8 import quantized

# Rows, terms and columns: feed forward and attention's output of ViT-B/32 and L/14; of the second,
# cuBLASLt's first algorithm is slow.
SIZES = [(25_600, 3072, 768), (51_200, 768, 768), (8_224, 4096, 1024), (8_224, 1024, 1024)]


def operands(
    num_rows: int, num_terms: int, num_columns: int, *, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": quantized(random(num_rows, num_terms), 2.0**-6).to(device),
        "weight": quantized(random(num_columns, num_terms), 2.0**-6).to(device),
        "bias": random(num_columns).to(device, dtype),
        "input_scale": torch.tensor(2.0**-6, device=device),
        "weight_scale": torch.tensor(2.0**-10, device=device),
        "out": 10 * random(num_rows, num_columns).to(device, dtype),
    }


def add(given: dict[str, Tensor]) -> None:
    with SumProduct(**given) as product:
        product.add()


def product_of(given: dict[str, Tensor]) -> Tensor:
    return torch._scaled_mm(
        given["x"],
        given["weight"].t(),
        scale_a=given["input_scale"],
        scale_b=given["weight_scale"],
        bias=given["bias"],
        out_dtype=given["out"].dtype,
        use_fast_accum=True,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_every_algorithm_gives_the_same_bits(
    size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    given = operands(*size, dtype=dtype, device="cuda")
    before = given["out"].clone()
    sums = []
    with SumProduct(**given) as product:
        for algorithm in product.algorithms():
            given["out"].copy_(before)
            product.run(algorithm)
            sums.append(given["out"].clone())
    assert sums
    for found in sums:
        torch.testing.assert_close(found, sums[0], rtol=0, atol=0)
    # A product of up to 64 is rounded before it is added, or not.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(sums[0], before + product_of(given), rtol=2 * step, atol=64 * step)


@pytest.mark.gpu
def test_sums_in_a_graph() -> None:
    given = operands(8_224, 1024, 1024, dtype=torch.float16, device="cuda")
    before = given["out"].clone()
    add(given)
    once = given["out"].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add(given)
    given["out"].copy_(before)
    graph.replay()
    torch.testing.assert_close(given["out"], once, rtol=0, atol=0)
    add(given)
    twice = given["out"].clone()
    given["out"].copy_(once)
    graph.replay()
    torch.testing.assert_close(given["out"], twice, rtol=0, atol=0)


class Library:
    """In place of cuBLASLt: notes calls, and answers them as it is told."""

    def __init__(self, *, proposals: Sequence[int] = (), **statuses: int) -> None:
        """`proposals`: statuses of the algorithms it proposes; `statuses`: of calls that fail."""
        self.calls: list[str] = []
        self._proposals = proposals
        self._statuses = statuses

    def __getattr__(self, name: str) -> Any:
        name = name.removeprefix("cublasLt")

        def call(*arguments: Any) -> Any:
            if name == "GetStatusName":
                return f"CUBLAS_STATUS_{arguments[0]}".encode()
            self.calls.append(name)
            if name == "MatmulAlgoGetHeuristic":
                found, num_found = arguments[-2:]
                for number, status in enumerate(self._proposals):
                    found[number].status, found[number].num_waves = status, number
                num_found._obj.value = len(self._proposals)
            return self._statuses.get(name, 0)

        return call


@pytest.fixture
def given() -> dict[str, Tensor]:
    return operands(32, 16, 48, dtype=torch.float16, device="cpu")


def with_library(library: Library, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setattr(sum_product, "_library", lambda: library)
    monkeypatch.setattr(sum_product, "_handle", ctypes.c_void_p)
    return library


def test_no_algorithm(monkeypatch: pytest.MonkeyPatch, given: dict[str, Tensor]) -> None:
    library = with_library(Library(), monkeypatch)
    with pytest.raises(DeviceError, match=r"no algorithm .* 32 x 16 x 48 to torch.float16 on cpu"):
        add(given)
    made = [name for name in library.calls if name.endswith("Create")]
    ended = [name for name in library.calls if name.endswith("Destroy")]
    assert len(made) == 5
    assert sorted(name.removesuffix("Destroy") for name in ended) == sorted(
        name.removesuffix("Create") for name in made
    )


@pytest.mark.parametrize(
    ("proposals", "milliseconds", "expected"),
    [
        pytest.param([0, 0, 0], [1.2, 1.0, 1.0], 0, id="the first, if it is nearly as fast"),
        pytest.param([0, 0, 0], [1.5, 1.2, 1.0], 1, id="else the next that is"),
        pytest.param([15, 0, 0], [0.1, 1.0, 1.0], 1, id="of those that can be used"),
    ],
)
def test_which_algorithm_is_chosen(
    proposals: list[int],
    milliseconds: list[float],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Tensor],
) -> None:
    with_library(Library(proposals=proposals), monkeypatch)
    before = given["out"].clone()

    def tried(product: SumProduct, algorithm: Algorithm) -> float:
        product.out += 1
        return milliseconds[int(algorithm.num_waves)]

    ran = []
    monkeypatch.setattr(sum_product, "_milliseconds", tried)
    monkeypatch.setattr(SumProduct, "run", lambda _, algorithm: ran.append(algorithm.num_waves))
    monkeypatch.setattr(sum_product, "_chosen", {})
    add(given)
    # The second time it is known.
    monkeypatch.delattr(sum_product, "_milliseconds")
    add(given)
    assert ran == [expected, expected]
    torch.testing.assert_close(given["out"], before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["MatmulDescCreate", "MatmulAlgoGetHeuristic"])
def test_a_call_that_fails(
    name: str, monkeypatch: pytest.MonkeyPatch, given: dict[str, Tensor]
) -> None:
    with_library(Library(**{name: 7}), monkeypatch)
    with pytest.raises(RuntimeError, match=f"^CUBLAS_STATUS_7 when calling cublasLt{name}$"):
        add(given)


def test_pytorch_without_a_library(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Tensor]
) -> None:
    sum_product._library.cache_clear()
    monkeypatch.setattr(sum_product.torch, "version", SimpleNamespace(cuda="0.1"))
    with pytest.raises(DeviceError, match=r"no cuBLASLt .*libcublasLt.so.0.* --backend"):
        add(given)
