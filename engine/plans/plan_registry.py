"""An engine's plans in the registry: found for a GPU and a profile, or compiled once for all.

Knows nothing of how plans are compiled or executed.
"""

import json
from pathlib import Path

from engine.manifest import AUDIT_FILE
from engine.plans.plan import Flavour, PlanProfile, Tower
from engine.plans.plan_builder import PlanConfig, build_plans, plan_key
from engine.registry import PLANS_DIR, Engine, Registry


def obtain_plan(
    engine: Engine,
    *,
    registry: Registry,
    profile: PlanProfile,
    flavour: Flavour | None = None,
    architecture: str | None = None,
) -> Path:
    """The folder of a plan; compiled first, by one of all who ask at once, if there is none.

    Args:
        engine: On this node.
        registry: Where its plans are kept.
        profile: Rows at a time.
        flavour: Whose plan; None for the TensorRT that is installed.
        architecture: GPU to compile for; None for the one here.

    Raises:
        DeviceError, PlanError: As for `build_plans`.
        EngineError: The registry cannot be read or written.
    """
    config = PlanConfig(
        profile=profile,
        flavour=flavour,
        architecture=architecture,
        fp8_products=_fp8_products(engine),
        timing_cache_dir=engine.directory / PLANS_DIR,
    )
    return registry.obtain_plan(
        engine.manifest.engine_id,
        plan_key(config).plan_id,
        lambda directory: build_plans(engine.directory, plan_dir=directory, config=config),
    )


def _fp8_products(engine: Engine) -> dict[Tower, frozenset[str]]:
    """What the engine's audit found to be FP8 in its graphs."""
    path = engine.directory / AUDIT_FILE
    if not path.exists():
        return {}
    audits = json.loads(path.read_text())
    towers: tuple[Tower, ...] = ("image", "text")
    return {tower: frozenset(audits[tower]["fp8"]) for tower in towers if tower in audits}
