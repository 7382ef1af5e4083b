"""Quantizes a tower to FP8 with NVIDIA ModelOpt, and keeps in 16 bit what FP8 would cost too much.

Knows nothing of where the sample came from or of how the result is stored, exported or run.

The recipe: static per-tensor E4M3 for the inputs and weights of every linear layer of the blocks
and for the two products of attention, scales from the largest value in the sample, weights rounded
for the least error of the output. If the tower is then not as close to the original as asked for,
units go back to 16 bit, first those that gain most accuracy for the operations they cost.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic

from torch import Tensor, nn

from engine.accuracy import Agreement, Thresholds, agreement
from engine.backends.torch_device import full_float32
from engine.errors import QuantizationError
from engine.progress import OnProgress
from engine.quantization.half_precision import check_weights
from engine.quantization.sensitivity import UnitCost, unit_costs
from engine.quantization.simulation import Simulation, TowerT, embed
from engine.quantization.units import Unit, units_of
from engine.sample import MIN_ROWS

# Rows on which units are ranked.
RANKING_ROWS, RANKING_BATCH_ROWS = 32, 4
# Rows on which a choice of units is judged, and what share of the allowed error it may have there,
# so that other rows and more of them pass too: the neighbours that CLIP ViT-B/16 with MiniLM loses
# of 800 photos were 1.25 times those of the 512 that had calibrated it.
JUDGING_ROWS = 512
MARGINS = {"min_cosine_p1": 0.95, "min_neighbour_overlap": 0.75}


@dataclass(frozen=True, kw_only=True)
class QuantizedTower(Generic[TowerT]):
    """A tower with FP8 modules in it, and how it came to be."""

    tower: TowerT
    """Float32 but for its FP8 weights; its units are quantized but for those kept."""
    fake_quantized: nn.Module | None
    """ModelOpt's simulation of the same, float32: the reference for what executes it. It holds all
    weights twice; None where it was let go."""
    quantized: tuple[Unit, ...]
    """Units in FP8."""
    kept: tuple[str, ...]
    """Units in 16 bit, in the order of their ranking."""
    costs: tuple[UnitCost, ...]
    """Of every unit, the best to keep in 16 bit first; empty where nothing had to be kept."""
    agreement: Agreement
    """With the original, on the rows that judged the choice."""


@full_float32()
def quantize_tower(
    tower: TowerT,
    batches: Sequence[Tensor],
    *,
    thresholds: Thresholds,
    on_progress: OnProgress,
) -> QuantizedTower[TowerT]:
    """Calibrate, round and choose.

    Args:
        tower: Float32; left as it is. On the device that is to do the work.
        batches: The sample, uint8 [rows, H, W, 3] or int32 [rows, T] each.
        thresholds: How close the result must be to the original.
        on_progress: Called with a stage's name, and how many of how many steps are done.

    Raises:
        QuantizationError: Too few rows, a point or weight that is always zero or not finite,
            activations beyond 16 bit, or thresholds that no choice meets.
    """
    num_rows = sum(len(batch) for batch in batches)
    if num_rows < MIN_ROWS:
        raise QuantizationError(
            f"{num_rows} rows to calibrate with; at least {MIN_ROWS} are needed: bring a larger "
            "catalog, or one with fewer rejects"
        )
    units = units_of(tower)
    if not units:
        raise QuantizationError(f"{type(tower).__name__} has no unit that could be quantized")
    check_weights(tower)
    simulation = Simulation(copy.deepcopy(tower), units=units)
    reference = simulation.calibrate(batches, on_progress=on_progress)
    simulation.round_weights(on_progress=on_progress)

    judging = _first_rows(batches, JUDGING_ROWS)
    expected = reference[: sum(len(batch) for batch in judging)]

    strict = thresholds.tightened(MARGINS)

    def judge(kept: Sequence[str]) -> Agreement:
        simulation.quantize_all_but(kept)
        return agreement(embed(simulation.tower, judging), expected)

    costs: list[UnitCost] = []
    kept: tuple[str, ...] = ()
    on_progress("judge", 0, 0)
    best = judge(kept)
    if strict.faults(best):
        on_progress("rank", 0, 0)
        simulation.quantize_all_but([unit.name for unit in units])
        costs = unit_costs(
            simulation.tower,
            _in_batches(_first_rows(batches, RANKING_ROWS), RANKING_BATCH_ROWS),
            units=units,
            quantized=simulation.quantized,
            seed=0,
        )
        costs.sort(key=lambda cost: cost.loss / cost.share, reverse=True)
        kept, best = _fewest_kept(
            costs, judge, measured=best, thresholds=strict, on_progress=on_progress
        )
    simulation.quantize_all_but(kept)
    return QuantizedTower(
        tower=simulation.quantized_copy(tower, kept=kept),
        fake_quantized=simulation.tower,
        quantized=tuple(unit for unit in units if unit.name not in kept),
        kept=kept,
        costs=tuple(costs),
        agreement=best,
    )


def _fewest_kept(
    costs: Sequence[UnitCost],
    judge: Callable[[Sequence[str]], Agreement],
    *,
    measured: Agreement,
    thresholds: Thresholds,
    on_progress: OnProgress,
) -> tuple[tuple[str, ...], Agreement]:
    """The head of the ranking that, kept in 16 bit, meets the thresholds.

    How far a measurement is from the thresholds says what loss would meet them, and the units'
    costs say after how many units that is reached; another measurement tells whether it is so.
    Between the last number that is too few and the first that is enough, halving finds the least.
    """
    ranked = [cost.unit for cost in costs]
    # The loss that is left with the first so many units in 16 bit.
    left = [sum(cost.loss for cost in costs[count:]) for count in range(len(costs) + 1)]

    def judge_first(count: int) -> Agreement:
        on_progress(f"judge with {count} of {len(costs)} units in 16 bit", 0, 0)
        return judge(ranked[:count])

    too_few, enough = 0, 0
    while not enough:
        if too_few == len(costs):
            raise QuantizationError(
                "not close enough even with every unit in 16 bit: "
                + "; ".join(thresholds.faults(measured))
            )
        target = left[too_few] * thresholds.loss_factor(measured)
        count = next(
            more
            for more in range(too_few + 1, len(left))
            if left[more] <= target or more == len(costs)
        )
        measured = judge_first(count)
        if thresholds.faults(measured):
            too_few = count
        else:
            enough = count
    while enough - too_few > 1:
        count = (too_few + enough) // 2
        found = judge_first(count)
        if thresholds.faults(found):
            too_few = count
        else:
            enough, measured = count, found
    return tuple(ranked[:enough]), measured


def _first_rows(batches: Sequence[Tensor], num_rows: int) -> list[Tensor]:
    chosen: list[Tensor] = []
    for batch in batches:
        missing = num_rows - sum(map(len, chosen))
        if missing <= 0:
            break
        chosen.append(batch[:missing])
    return chosen


def _in_batches(batches: Sequence[Tensor], num_rows: int) -> Iterator[Tensor]:
    for batch in batches:
        yield from batch.split(num_rows)
