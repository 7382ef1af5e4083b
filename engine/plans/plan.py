"""What a plan is: one engine compiled for one TensorRT version, one GPU architecture, one profile.

Knows nothing of how plans are compiled or executed; reads and writes their record, `plan.json`.

A plan folder, `<engine folder>/plans/<plan_id>/`:

    image.plan  text.plan                    the compiled towers
    image.layers.json  text.layers.json      what the compiler made of them
    plan.json                                the record, written last
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.errors import PlanError
from engine.manifest import Manifest

PLAN_FILE = "plan.json"
FORMAT_VERSION = 1
# Token rows are padded to multiples of this: few shapes, so few CUDA graphs, and little waste.
LENGTH_STEP = 8

# TensorRT, for all cards; TensorRT for RTX, which also builds for cards that are not there.
Flavour = Literal["tensorrt", "tensorrt_rtx"]
Tower = Literal["image", "text"]
Shape = tuple[int, ...]

_MEND = "remove the folder, the next run builds it anew"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanProfile:
    """How many rows a plan takes at a time."""

    kind: Literal["bulk", "query"]
    """bulk: always `max_rows`, so that kernels are chosen for it; query: 1 to `max_rows`."""
    max_rows: int
    """Images or texts of one launch."""

    def __post_init__(self) -> None:
        """Raise ValueError for a field out of bounds."""
        if self.kind not in ("bulk", "query"):
            raise ValueError(f"kind={self.kind!r}: expected 'bulk' or 'query'")
        if self.max_rows < 1:
            raise ValueError(f"max_rows={self.max_rows!r}: expected 1 or more")

    @property
    def min_rows(self) -> int:
        """Smaller batches are filled up to this."""
        return self.max_rows if self.kind == "bulk" else 1


# 256 images keep the largest cards busy with any CLIP, at 38 MB of pixels (224 x 224).
BULK = PlanProfile(kind="bulk", max_rows=256)
QUERY = PlanProfile(kind="query", max_rows=8)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanKey:
    """What a plan is bound to; it loads nowhere else."""

    flavour: Flavour
    """Whose plan it is."""
    version: str
    """Of that library, in full."""
    architecture: str
    """Of the GPU: `sm_90`."""
    profile: PlanProfile
    """Rows at a time."""

    @property
    def plan_id(self) -> str:
        """Name of the plan's folder: `tensorrt-11.4.0.106-sm_90-bulk256`."""
        profile = f"{self.profile.kind}{self.profile.max_rows}"
        return f"{self.flavour}-{self.version}-{self.architecture}-{profile}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerPlan:
    """One compiled tower."""

    min_shape: Shape
    """Of its input: [N, H, W, 3] or [N, T]."""
    max_shape: Shape
    """Of its input; kernels are chosen for this one."""
    plan_bytes: int
    """Size of the file, about what weights and kernels take on the GPU."""
    activation_bytes: int | None
    """Scratch memory on the GPU; None if the library did not say."""
    num_fp8_products: int
    """Matrix products of the graph that are multiplied in FP8."""
    fallbacks: tuple[str, ...]
    """ONNX nodes of the products that the graph wants in FP8 and the library left in 16 bit."""

    def precision_in_words(self) -> str:
        """`70 of 72 products in FP8, in 16 bit a, b`."""
        num_wanted = self.num_fp8_products + len(self.fallbacks)
        if not num_wanted:
            return "without FP8"
        left = f", in 16 bit {', '.join(self.fallbacks)}" if self.fallbacks else ""
        return f"{self.num_fp8_products} of {num_wanted} products in FP8{left}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRecord:
    """One plan folder, complete."""

    engine_id: str
    """Of the engine that was compiled."""
    key: PlanKey
    """Where the plan runs."""
    image: TowerPlan
    """The image tower."""
    text: TowerPlan | None
    """None for an engine without a text tower."""
    build_seconds: float
    """For all towers."""
    files: dict[str, str]
    """File name -> SHA-256 of its content."""

    @property
    def towers(self) -> dict[Tower, TowerPlan]:
        """The towers that there are."""
        return (
            {"image": self.image} if self.text is None else {"image": self.image, "text": self.text}
        )

    def precision_in_words(self) -> str:
        """Which products are multiplied in FP8, and which the library left in 16 bit."""
        return "; ".join(
            f"{name} {tower.precision_in_words()}" for name, tower in self.towers.items()
        )

    def write(self, directory: Path) -> None:
        """Write `plan.json`, the last file of a plan."""
        record = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        (directory / PLAN_FILE).write_text(json.dumps(record, indent=2) + "\n")


def plan_file(tower: Tower) -> str:
    """Name of a compiled tower's file."""
    return f"{tower}.plan"


def layers_file(tower: Tower) -> str:
    """Name of the file that lists a compiled tower's layers."""
    return f"{tower}.layers.json"


def input_shapes(manifest: Manifest, profile: PlanProfile) -> dict[Tower, tuple[Shape, Shape]]:
    """The least and the largest input of each of an engine's towers under a profile."""
    size = (manifest.preprocessing.height, manifest.preprocessing.width, 3)
    rows = (profile.min_rows, profile.max_rows)
    shapes: dict[Tower, tuple[Shape, Shape]] = {"image": ((rows[0], *size), (rows[1], *size))}
    if manifest.text is not None:
        longest = manifest.text.max_tokens
        shortest = longest if manifest.text.pads_to_max else min(LENGTH_STEP, longest)
        shapes["text"] = ((rows[0], shortest), (rows[1], longest))
    return shapes


def read_plan(directory: Path) -> PlanRecord:
    """Read a plan's record; PlanError if it is missing, damaged or of a newer format."""
    path = directory / PLAN_FILE
    try:
        return parse_plan(path.read_bytes(), path=str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise PlanError(f"{directory}: no plan there ({PLAN_FILE} is missing)") from None


def parse_plan(content: bytes, *, path: str) -> PlanRecord:
    """Read the content of a plan's record; PlanError if it is damaged or of a newer format.

    Args:
        content: Of `plan.json`.
        path: Where it was, for messages.
    """
    try:
        record: dict[str, Any] = json.loads(content)
        version = record.pop("format_version")
        if version > FORMAT_VERSION:
            raise PlanError(f"{path}: written by a newer Clipmill (format {version}); upgrade")
        key, image, text = record.pop("key"), record.pop("image"), record.pop("text")
        return PlanRecord(
            key=PlanKey(**{**key, "profile": PlanProfile(**key["profile"])}),
            image=_tower_plan(image),
            text=None if text is None else _tower_plan(text),
            **record,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PlanError(f"{path}: damaged ({error}); {_MEND}") from error


def _tower_plan(record: dict[str, Any]) -> TowerPlan:
    tuples = {name: tuple(value) for name, value in record.items() if isinstance(value, list)}
    return TowerPlan(**{**record, **tuples})


def check_fits(record: PlanRecord, *, engine_id: str, here: PlanKey) -> None:
    """Raise PlanError unless a plan is of this engine and runs on this machine.

    Args:
        record: The plan's.
        engine_id: Of the engine to run.
        here: The library and the GPU at hand, and the wanted profile.
    """
    if record.engine_id != engine_id:
        raise PlanError(f"plan of engine {record.engine_id}, wanted is {engine_id}: name its own")
    made = record.key
    build = "run `clipmill engine build` there"
    if made.architecture != here.architecture:
        raise PlanError(
            f"plan built for {made.architecture}, this GPU is {here.architecture}; {build}"
        )
    if made.flavour != here.flavour:
        raise PlanError(f"plan built by {made.flavour}, here is {here.flavour}; {build}")
    if made.version != here.version:
        raise PlanError(
            f"plan built by {made.flavour} {made.version}, here is {here.version}; {build}, or "
            f"install {made.version}"
        )
    if made.profile != here.profile:
        raise PlanError(f"plan {made.plan_id} is not {here.plan_id}; {build}")


def read_verified(record: PlanRecord, directory: Path, *, name: str) -> bytes:
    """A file's content, which is what its checksum says; else PlanError."""
    path = directory / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PlanError(f"{path}: cannot be read ({error.strerror}); {_MEND}") from error
    if hashlib.sha256(content).hexdigest() != record.files.get(name):
        raise _damaged(record, path)
    return content


def _damaged(record: PlanRecord, path: Path) -> PlanError:
    return PlanError(
        f"plan {record.key.plan_id}: {path} is damaged, it does not match its checksum; {_MEND}"
    )
