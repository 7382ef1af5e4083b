"""The torch backend on a real card: agreement, equality of bits, speed, where the time goes.

    PYTHONPATH=. python3 tests/torch_fp8_check.py [WORD ...]

With words, only the sections whose names have one of them. CLIP ViT-B/32 and L/14 in full size
with random weights. Needs a card with FP8 and about four minutes; a section that fails says so, and
the others go on. The last line is all results as JSON.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.backends.cuda_graphs import CudaGraphRunner
from engine.backends.fused import fuse
from engine.towers import ImageTower, TextTower, Tower
from tests.full_size_towers import (
    EOS_ID,
    IMAGE_SIZE,
    MAX_TOKENS,
    SIZES,
    blurred_pixels,
    captions,
    image_towers,
    text_towers,
)
from tests.gpu_timing import DEVICE, Graphed, attentions, median_ms, products
from tests.max_calibration import quantize

TIME_LIMIT_SECONDS = 240
NUM_CHECKED, NUM_CALIBRATED = 256, 64
BATCHES = (64, 256, 1024)
STARTED = time.monotonic()
RESULTS: dict[str, Any] = {}

MIXES: dict[str, Callable[[int, str], bool]] = {
    "fp8": lambda block, unit: False,
    "mixed": lambda block, unit: block < 2 or (unit == "fc2" and block % 2 == 0),
    "fp16": lambda block, unit: True,
}


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def in_batches(tower: Callable[[Tensor], Tensor], rows: Tensor, *, size: int = 64) -> Tensor:
    return torch.cat([tower(batch).float() for batch in rows.split(size)])


def agreement(found: Tensor, expected: Tensor) -> dict[str, float]:
    cosines = nn.functional.cosine_similarity(found.double(), expected.double()).cpu().numpy()
    return {
        "mean": round(float(cosines.mean()), 6),
        "p1": round(float(np.percentile(cosines, 1)), 6),
        "min": round(float(cosines.min()), 6),
    }


def fused(tower: Any, dtype: torch.dtype = torch.float16) -> Any:
    """A copy that the backend executes."""
    copied = copy.deepcopy(tower).to_dtype(dtype)
    fuse(copied)
    return copied


def runner_of(tower: Tower, *, max_rows: int) -> CudaGraphRunner:
    is_image = isinstance(tower, ImageTower)
    return CudaGraphRunner(
        tower,
        row_shape=(IMAGE_SIZE, IMAGE_SIZE, 3) if is_image else (MAX_TOKENS,),
        dtype=torch.uint8 if is_image else torch.int32,
        max_rows=max_rows,
        length_step=8,
        device=DEVICE,
    )


class Check:
    """One CLIP size: its towers, quantized in every mix."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.image, self.their_image = image_towers(SIZES[name], device=DEVICE)
        self.text, self.their_text = text_towers(SIZES[name], device=DEVICE)
        self.pixels = blurred_pixels(NUM_CHECKED, seed=1, device=DEVICE)
        self.token_ids = captions(NUM_CHECKED, seed=1, length=32).to(DEVICE)
        self.quantized: dict[str, tuple[ImageTower, TextTower]] = {}
        calibration = blurred_pixels(NUM_CALIBRATED, seed=2, device=DEVICE)
        for mix, is_kept in MIXES.items():
            image, text = copy.deepcopy(self.image), copy.deepcopy(self.text)
            quantize(image, calibration, is_kept=is_kept)
            quantize(text, captions(NUM_CALIBRATED, seed=2).to(DEVICE), is_kept=is_kept)
            self.quantized[mix] = image, text

    def agreement(self) -> dict[str, Any]:
        """The backend, and the rounded towers in float32, against float32; and each other."""
        found: dict[str, Any] = {}
        for half, rows in (("image", self.pixels), ("text", self.token_ids)):
            exact = in_batches(getattr(self, half), rows)
            for mix, (image, text) in self.quantized.items():
                rounded = in_batches(image if half == "image" else text, rows)
                ours = in_batches(fused(image if half == "image" else text), rows)
                found[f"{half} {mix}"] = {
                    "backend to fp32": agreement(ours, exact),
                    "rounded to fp32": agreement(rounded, exact),
                    "backend to rounded": agreement(ours, rounded),
                }
        theirs = in_batches(
            lambda rows: self.their_image(pixel_values=self.image.normalize(rows)).image_embeds,
            self.pixels,
        )
        ours = in_batches(fused(self.quantized["fp8"][0], torch.bfloat16), self.pixels)
        exact = in_batches(self.image, self.pixels)
        found["image fp8 with bfloat16 between"] = agreement(ours, exact)
        found["transformers fp32 to our fp32"] = agreement(theirs, exact)
        return found

    def equality(self) -> dict[str, Any]:
        """Bits of repeated runs, with and without graphs; short batches."""
        found: dict[str, Any] = {}
        for half, rows in (("image", self.pixels), ("text", self.token_ids)):
            tower = fused(self.quantized["fp8"][0 if half == "image" else 1])
            eager = tower(rows).cpu().numpy()
            runner = runner_of(tower, max_rows=NUM_CHECKED)
            host = rows.cpu().numpy()
            once = next(iter(runner.run([host])))
            many = list(runner.run([host] * 20))
            found[f"{half}: graph equals no graph"] = bool((once == eager).all())
            found[f"{half}: 20 overlapped runs equal one"] = all((x == once).all() for x in many)
            shorts = {}
            for num_rows in (1, 3, 60, 200):
                part = next(iter(runner.run([host[:num_rows]])))
                shorts[num_rows] = agreement(
                    torch.from_numpy(part), torch.from_numpy(once[:num_rows])
                )["min"]
            found[f"{half}: short batches to the whole, lowest cosine"] = shorts
        return found

    def image_speed(self) -> dict[str, Any]:
        """Images per second of the card alone, and with copies from host memory and back."""
        found: dict[str, Any] = {}
        theirs = copy.deepcopy(self.their_image).half()
        for size in BATCHES:
            rows = blurred_pixels(size, seed=3, device=DEVICE)
            pixel_values = self.image.normalize(rows).half()
            rates = {"transformers fp16": lambda x=pixel_values: theirs(pixel_values=x)}
            for mix in ("fp8", "fp16"):
                rates[mix] = Graphed(fused(self.quantized[mix][0]), rows)
            found[str(size)] = {
                name: round(size / median_ms(call) * 1e3) for name, call in rates.items()
            }
            del rates
            found[str(size)]["fp8 from host memory"] = self._rate_from_host(rows)
            say(self.name, size, found[str(size)])
        return found

    def _rate_from_host(self, rows: Tensor) -> int:
        runner = runner_of(fused(self.quantized["fp8"][0]), max_rows=len(rows))
        batches = [rows.cpu().numpy()] * max(4, 8192 // len(rows))
        list(runner.run(batches[:4]))
        started = time.monotonic()
        list(runner.run(batches))
        return round(len(rows) * len(batches) / (time.monotonic() - started))

    def text_speed(self) -> dict[str, Any]:
        """Captions per second; sorted by length in ours, padded to 32 and 77 in transformers'."""
        num_texts, found = 16384, {}
        ids = captions(num_texts, seed=3)
        ends = (ids == EOS_ID).int().argmax(dim=1) + 1
        for size in (256, 1024):
            batches = []
            for batch, last in zip(ids.split(size), ends.split(size), strict=True):
                batches.append(batch[:, : -(-int(last.max()) // 8) * 8].contiguous().numpy())
            for mix in ("fp8", "fp16"):
                runner = runner_of(fused(self.quantized[mix][1]), max_rows=size)
                list(runner.run(batches))
                started = time.monotonic()
                list(runner.run(batches))
                found[f"{mix} at {size}"] = round(num_texts / (time.monotonic() - started))
        theirs = copy.deepcopy(self.their_text).half()
        for length in (32, MAX_TOKENS):
            batch = ids[:1024, :length].long().to(DEVICE)
            ms = median_ms(lambda x=batch: theirs(input_ids=x))
            found[f"transformers fp16 at 1024, padded to {length}"] = round(1024 / ms * 1e3)
        return found

    def kernel_times(self) -> list[str]:
        """The 15 kernels that take most of one batch."""
        tower = fused(self.quantized["fp8"][0])
        tower(self.pixels)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            tower(self.pixels)
            torch.cuda.synchronize()
        rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
        total = sum(row.self_device_time_total for row in rows)
        lines = [f"{total / 1e3:9.3f} ms in all, {len(self.pixels)} images"]
        lines += [
            f"{row.self_device_time_total / 1e3:9.3f} ms {row.count:5d} x {row.key[:100]}"
            for row in rows[:15]
        ]
        return lines

    def memory(self) -> dict[str, float]:
        """GiB that the backend takes for batches of 256, and what the 16-bit weights would."""
        found = {}
        for half in (0, 1):
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            runner = runner_of(fused(self.quantized["fp8"][half]), max_rows=256)
            torch.cuda.empty_cache()
            name = "image" if half == 0 else "text"
            found[name] = round((torch.cuda.memory_reserved() - before) / 2**30, 3)
            num_weights = sum(p.numel() for p in (self.image, self.text)[half].parameters())
            found[f"{name} weights in 16 bit"] = round(2 * num_weights / 2**30, 3)
            del runner
        return found

    def load_seconds(self) -> dict[str, Any]:
        """Seconds to a ready encoder in a new process, its imports not counted."""
        found = {}
        with tempfile.TemporaryDirectory() as cache_dir:
            for name in ("kernels to compile", "kernels in Triton's cache"):
                done = subprocess.run(
                    [sys.executable, "-m", "tests.torch_load", self.name],
                    env={**os.environ, "TRITON_CACHE_DIR": cache_dir},
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                found[name] = json.loads(done.stdout.splitlines()[-1])
        return found

    def compiled_speed(self) -> dict[str, int]:
        """Our tower through torch.compile in bfloat16, whole images per second."""
        tower = torch.compile(copy.deepcopy(self.image).to_dtype(torch.bfloat16))
        rows = blurred_pixels(256, seed=3, device=DEVICE)
        return {"torch.compile bf16 at 256": round(256 / median_ms(lambda: tower(rows)) * 1e3)}


def sections() -> Iterator[tuple[str, Callable[[], Any]]]:
    """All sections by name; one that fails leaves the others to go on."""
    checks: dict[str, Check] = {}

    def build(name: str) -> str:
        checks.clear()
        checks[name] = Check(name)
        return "built"

    yield "FP8 products of L/14 at 256 images", products
    yield "attention, us", attentions
    for name in SIZES:
        yield f"{name} towers", lambda name=name: build(name)
        yield f"{name} agreement", lambda name=name: checks[name].agreement()
        yield f"{name} equality of bits", lambda name=name: checks[name].equality()
        yield f"{name} images/s", lambda name=name: checks[name].image_speed()
        yield f"{name} kernels", lambda name=name: checks[name].kernel_times()
        yield f"{name} texts/s", lambda name=name: checks[name].text_speed()
        yield f"{name} memory, GiB", lambda name=name: checks[name].memory()
        yield f"{name} load", lambda name=name: checks[name].load_seconds()
    # Slow to compile, so the one that says most first.
    yield "L/14 torch.compile", lambda: checks["L/14"].compiled_speed()
    yield "B/32 towers again", lambda: build("B/32")
    yield "B/32 torch.compile", lambda: checks["B/32"].compiled_speed()


def main() -> None:
    """Run all sections that the time allows."""
    RESULTS["versions"] = f"torch {torch.__version__}, {torch.cuda.get_device_name(DEVICE)}"
    say(RESULTS["versions"])
    for name, section in sections():
        if len(sys.argv) > 1 and not any(word in name for word in ("towers", *sys.argv[1:])):
            continue
        started = time.monotonic()
        if started - STARTED > TIME_LIMIT_SECONDS:
            RESULTS[name] = "no time left"
            say(f"\n== {name}: no time left")
            continue
        try:
            RESULTS[name] = section()
        except Exception:
            RESULTS[name] = traceback.format_exc()
            say(RESULTS[name])
        say(f"\n== {name} ({time.monotonic() - started:.1f} s)")
        say(json.dumps(RESULTS[name], indent=2))
    say("\n" + json.dumps(RESULTS))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
