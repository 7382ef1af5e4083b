"""Which module may import what, read from the sources; what import-linter's layers leave open."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY_DIR = Path(__file__).resolve().parents[1]
PACKAGES = ("engine", "pipelines", "jobs")

# Library -> the only files that may import it.
ONLY_IN = {
    # Whatever else speaks HTTP goes by fsspec, or is asked by a test.
    "aiohttp": ("jobs/submission/server.py", "pipelines/fetching/http_fetch.py"),
    "tensorrt": ("engine/plans/runtimes.py",),
    "tensorrt_rtx": ("engine/plans/runtimes.py",),
    "cuda": ("engine/device.py", "engine/decoding/nvjpeg.py"),
    "modelopt": ("engine/quantization/simulation.py",),
    "onnx": ("engine/quantization/audit.py",),
    "triton": (
        "engine/backends/attention_kernel.py",
        "engine/backends/image_tokens.py",
        "engine/backends/kernels.py",
        "engine/backends/patches.py",
        "engine/backends/product_kernel.py",
        "engine/backends/torch_device.py",
        "engine/decoding/early_ends.py",
        "engine/decoding/huffman_lookups.py",
        "engine/decoding/resample.py",
    ),
    "nvidia": ("engine/decoding/gpu_decoder.py",),
    "grpc": ("pipelines/cluster/spilling.py",),
    "autofaiss": ("jobs/benches/autofaiss_program.py",),
    "faiss": (
        "jobs/benches/autofaiss_program.py",
        "pipelines/indexes/building.py",
        "pipelines/indexes/lists.py",
        "pipelines/indexes/opening.py",
        "pipelines/indexes/recall.py",
        "pipelines/indexes/shards.py",
        "pipelines/indexes/training.py",
        "pipelines/indexes/truth.py",
        "pipelines/indexes/updating.py",
    ),
}
# Library -> packages that may not import it.
NEVER_IN = {
    "ray": ("engine",),
    "pyarrow": ("engine",),
    "duckdb": ("engine",),
    "fastapi": ("engine", "pipelines"),
    "prometheus_client": ("engine", "pipelines"),
    "starlette": ("engine", "pipelines"),
    "uvicorn": ("engine", "pipelines"),
}

# What workers without a model import, and what a person waits for who only looks at a store.
LIGHT_MODULES = (
    "jobs.doctor",
    "jobs.runs",
    "jobs.snapshots",
    "jobs.submit",
    "pipelines.schema",
    "pipelines.decode",
    "engine.preprocess",
    "engine.manifest",
    "engine.registry",
    "engine.build",
    "engine.plans.plan_builder",
    "engine.backends.onnx_cpu",
    "engine.backends.trt",
)
HEAVY_LIBRARIES = ("torch", "transformers", "tensorrt", "tensorrt_rtx", "cuda", "faiss")

# Home and scratch folders of one machine. A reader's own are spelled with ~ or a variable.
MACHINE_PATH = re.compile(
    r"(?<![\w.~:/}])/(?:home|Users|root|work|workspace|scratch|mnt|tmp)/[\w.-]+|\b[A-Z]:\\\\?Users"
)
# The cloud image's user, whose home `ray up` fills.
FOREIGN_HOME = "/home/ubuntu"
# Ray's own, the same on every machine.
RAY_FOLDER = "/" + "tmp/ray"
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".html", ".txt", ".json", ".cfg", ""}


def imported_libraries(source: str) -> set[str]:
    """Top-level names that a module imports, at its head or within a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module.split(".")[0])
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(str(node.args[0].value).split(".")[0])
    return found


def violations(directory: Path) -> list[str]:
    """`file imports library`, for each import that a rule forbids."""
    found = []
    for package in PACKAGES:
        for path in sorted((directory / package).rglob("*.py")):
            name = path.relative_to(directory).as_posix()
            for library in sorted(imported_libraries(path.read_text(encoding="utf-8"))):
                allowed = name in ONLY_IN.get(library, (name,))
                if not allowed or package in NEVER_IN.get(library, ()):
                    found.append(f"{name} imports {library}")
    return found


def project_files() -> Iterator[Path]:
    """Text files that are part of the project, tracked or about to be."""
    for package in (*PACKAGES, "tests"):
        yield from (REPOSITORY_DIR / package).rglob("*")
    yield from REPOSITORY_DIR.iterdir()
    yield from (REPOSITORY_DIR / ".ci").iterdir()


def machine_paths(text: str) -> list[str]:
    return [
        found for found in MACHINE_PATH.findall(text) if found not in (FOREIGN_HOME, RAY_FOLDER)
    ]


def test_every_import_is_allowed() -> None:
    assert violations(REPOSITORY_DIR) == []


def test_the_rules_see_the_imports() -> None:
    # That the sources are read at all: these libraries are imported where they may be.
    sources = {
        "faiss": "pipelines/indexes/lists.py",
        "onnxruntime": "engine/backends/onnx_cpu.py",
        "torch": "engine/towers.py",
    }
    for library, name in sources.items():
        assert library in imported_libraries((REPOSITORY_DIR / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("engine/plans/runtimes.py", "import tensorrt as trt", []),
        (
            "engine/backends/trt.py",
            "from tensorrt import Logger",
            ["engine/backends/trt.py imports tensorrt"],
        ),
        ("engine/gate.py", "import tensorrt", ["engine/gate.py imports tensorrt"]),
        ("engine/towers.py", "from onnx import helper", ["engine/towers.py imports onnx"]),
        ("engine/towers.py", "import onnxruntime", []),
        ("engine/registry.py", "def f():\n    import ray.data", ["engine/registry.py imports ray"]),
        ("pipelines/stages.py", "import ray", []),
        ("pipelines/store.py", "import numpy, faiss", ["pipelines/store.py imports faiss"]),
        (
            "jobs/bench.py",
            "import importlib\nimportlib.import_module('faiss.contrib')",
            ["jobs/bench.py imports faiss"],
        ),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, name: str, source: str, found: list[str]) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path) == found


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY_DIR, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert module in loaded
    assert loaded.isdisjoint(HEAVY_LIBRARIES)


def test_no_file_names_a_path_of_one_machine() -> None:
    num_read, found = 0, []
    for path in project_files():
        if path.is_file() and path.suffix in TEXT_SUFFIXES:
            num_read += 1
            named = machine_paths(path.read_text(encoding="utf-8"))
            found += [f"{path.relative_to(REPOSITORY_DIR)}: {name}" for name in named]
    assert found == []
    assert num_read > 50


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("open('/" + "home/someone/catalog')", ["/" + "home/someone"]),
        ("cd /" + "Users/someone", ["/" + "Users/someone"]),
        ("C:" + "\\Users\\someone", ["C:" + "\\Users"]),
        ("/" + "home/ubuntu/clipmill", []),
        ("/" + "tmp/ray/session_latest", []),
        ("/" + "tmp/rays", ["/" + "tmp/rays"]),
        ("s3://bucket/home/catalog and ~/home/x, https://example.com/tmp/x", []),
    ],
)
def test_a_path_of_one_machine_is_found(text: str, found: list[str]) -> None:
    assert machine_paths(text) == found
