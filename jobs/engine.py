"""`clipmill engine build|list|show|promote|rollback|gc`: engines, their gates and promotions.

Knows nothing of how any of it is done.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import fields

from engine.accuracy import Thresholds
from engine.backends.choice import WANTED
from engine.checkpoint import find_checkpoint
from engine.errors import EngineError
from engine.garbage import Garbage, Retention, find_garbage, remove_garbage
from engine.inventory import EngineEntry, engine_entry, list_engines, plan_records
from engine.plans.plan import PlanRecord
from engine.promotion import history, promote, rollback, rollback_from
from engine.registry import Registry, default_engines_uri
from jobs.command import Actions, CommandParser, dispatch, print_result, run
from jobs.fetch_options import add_fetch_options, fetch_policy_from
from jobs.logs import event_log
from jobs.progress import shown_steps
from pipelines.building import BuildConfig, BuildResult, build_engine
from pipelines.catalog import CatalogConfig
from pipelines.decode import RowLimits
from pipelines.sampling import SampleConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the action that the first word names; returns its exit code."""
    return dispatch("engine", ACTIONS, argv)


def _build(argv: Sequence[str]) -> int:
    parser = _build_parser()
    options = parser.parse_options(argv)
    # ModelOpt prints of its own, on stdout, where only the result belongs.
    with redirect_stdout(sys.stderr), event_log("engine build"), shown_steps() as on_progress:
        result = build_engine(build_config_from(options), on_progress=on_progress)
    print_result(result, as_json=options.json, text=build_summary(result))
    return 0 if result.gate.passed else 1


def build_config_from(options: Namespace) -> BuildConfig:
    """The configuration that the options describe; ValueError for one out of bounds."""
    return BuildConfig(
        checkpoint=options.checkpoint,
        revision=options.revision,
        precision=options.precision,
        sample=SampleConfig(
            catalog=CatalogConfig(
                uri=options.calibrate,
                key_column=options.key_column,
                image_column=options.image_column,
                text_column=options.text_column,
            ),
            num_rows=options.rows,
            num_held_out=options.held_out,
            label_column=options.label_column,
            seed=options.seed,
            limits=RowLimits(fetch=fetch_policy_from(options)),
        ),
        thresholds=Thresholds(
            **{field.name: getattr(options, field.name) for field in fields(Thresholds)}
        ),
        backend=options.backend,
        plans_for=tuple(options.plans_for),
        engines_uri=options.engines,
    )


def build_summary(result: BuildResult) -> str:
    """What came of a build, for a terminal."""
    manifest, gate = result.manifest, result.gate
    lines = [f"engine {manifest.engine_id} of {manifest.checkpoint}"]
    if manifest.quantization is not None:
        lines.append(f"  kept in 16 bit: {manifest.quantization.kept_in_words() or 'no unit'}")
    judged = {
        **gate.agreements,
        **{f"{name} for queries": found for name, found in gate.query_agreements.items()},
    }
    lines += [
        f"  {name:<6} cosine mean {agreement.cosine_mean:.4f}, 1st percentile "
        f"{agreement.cosine_p1:.4f}, lowest {agreement.cosine_min:.4f}; overlap of ten neighbours "
        f"{agreement.neighbour_overlap:.4f} ({agreement.num_rows} held-out rows)"
        for name, agreement in judged.items()
    ]
    lines += [
        f"  {recall.direction} recall@1, 5, 10: "
        f"{', '.join(f'{value:.3f}' for value in recall.measured.values())}; float32 "
        f"{', '.join(f'{value:.3f}' for value in recall.reference.values())}"
        for recall in gate.recalls
    ]
    if gate.top1 is not None:
        lines.append(
            f"  zero-shot top-1 of {gate.top1.num_classes} classes: {gate.top1.measured:.3f}; "
            f"float32 {gate.top1.reference:.3f}"
        )
    lines += [
        f"  {speed.encoder}: {speed.rows_per_second:>9,.0f} {speed.modality}s/s in batches of "
        f"{speed.batch_rows}"
        for speed in gate.speeds
    ]
    lines += [f"  {plan_line(plan.key.plan_id, plan)}" for plan in result.plans]
    lines += [f"  fault: {fault}" for fault in gate.faults]
    lines.append(verdict(result))
    lines.append(f"report: {result.report_path}/report.html")
    return "\n".join(lines)


def plan_line(plan_id: str, plan: PlanRecord | None) -> str:
    """What a plan multiplies in FP8, in one line; None for one that cannot be read."""
    what = "damaged, or of a newer Clipmill" if plan is None else plan.precision_in_words()
    return f"plan {plan_id}: {what}"


def verdict(result: BuildResult) -> str:
    """What the gate said and what follows from it, in one line."""
    if result.gate.passed:
        now = "promoted" if result.is_promoted else "promoted, but another was so right after it"
        return f"gate passed by {result.gate.backend}: {now}"
    now = "not promoted"
    if result.is_promoted:
        now = (
            "current, but refused until it passes again; `clipmill engine rollback --checkpoint "
            f"{result.manifest.checkpoint}` goes back to the one before"
        )
    return f"gate failed by {result.gate.backend}: {now}"


def _list(argv: Sequence[str]) -> int:
    options = _parser("list", "List all engines, the newest first.").parse_options(argv)
    entries = list_engines(Registry(options.engines))
    head = f"{'engine':<22} {'promoted':<9} {'gate':<7} {'plans':>5} {'MiB':>7}  checkpoint"
    lines = [head, *map(entry_line, entries)] if entries else ["no engines"]
    print_result(entries, as_json=options.json, text="\n".join(lines))
    return 0


def entry_line(entry: EngineEntry) -> str:
    """One engine in one line."""
    gate = {None: "none", True: "passed", False: "failed"}[entry.gate_passed]
    return (
        f"{entry.engine_id:<22} {'yes' if entry.is_promoted else '':<9} {gate:<7} "
        f"{len(entry.plan_ids):>5} {entry.num_bytes / 2**20:>7,.0f}  {entry.manifest.checkpoint}"
    )


def _show(argv: Sequence[str]) -> int:
    parser = _parser("show", "Show one engine: manifest, plans, gate, promotions.")
    parser.add_argument("engine_id", metavar="ID")
    options = parser.parse_options(argv)
    registry = Registry(options.engines)
    entry = engine_entry(registry, options.engine_id)
    if entry is None:
        raise EngineError(
            f"engines {registry.uri}: no engine {options.engine_id}; `clipmill engine list` shows "
            "those there are"
        )
    manifest = entry.manifest
    log = history(registry, manifest.checkpoint_digest)
    plans = plan_records(registry, options.engine_id)
    quantization = manifest.quantization
    facts = {
        "checkpoint": manifest.checkpoint,
        "revision": manifest.revision or "",
        "precision": manifest.precision,
        "dimension": manifest.embedding_dim,
        "modalities": ", ".join(manifest.modalities),
        "published": entry.published_at,
        "size": f"{entry.num_bytes / 2**20:,.1f} MiB",
        "gate": {None: "never judged", True: "passed", False: "failed"}[entry.gate_passed],
        "promoted": "yes" if entry.is_promoted else "no",
        "plans": "" if plans else "none",
        "calibrated with": (
            f"{quantization.num_calibration_rows} rows of {quantization.calibration_uri}"
            if quantization
            else ""
        ),
        "kept in 16 bit": quantization.kept_in_words() if quantization else "",
        "versions": ", ".join(f"{name} {number}" for name, number in manifest.versions.items()),
        "promotions": "; ".join(f"{step.at} {step.action} {step.engine_id}" for step in log),
    }
    lines = [f"{name:<16} {fact}" for name, fact in facts.items() if fact != ""]
    lines += [plan_line(plan_id, plan) for plan_id, plan in plans.items()]
    text = "\n".join([options.engine_id, *lines])
    shown = {"entry": entry, "plans": plans, "promotions": log}
    print_result(shown, as_json=options.json, text=text)
    return 0


def _promote(argv: Sequence[str]) -> int:
    parser = _parser("promote", "Make an engine the current one of its checkpoint.")
    parser.add_argument("engine_id", metavar="ID")
    options = parser.parse_options(argv)
    entry = promote(Registry(options.engines), options.engine_id)
    before = f", before it {entry.previous}" if entry.previous else ""
    print_result(entry, as_json=options.json, text=f"{entry.engine_id} is current{before}")
    return 0


def _rollback(argv: Sequence[str]) -> int:
    parser = _parser("rollback", "Make the engine current that was so before.")
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--checkpoint", metavar="ID_OR_DIR", help="of which model")
    of.add_argument("--engine", metavar="ID", help="the current engine of that model")
    parser.add_argument("--revision", help="hub branch, tag or commit of the checkpoint")
    options = parser.parse_options(argv)
    registry = Registry(options.engines)
    if options.engine is not None:
        if options.revision is not None:
            raise ValueError(f"engine {options.engine} has a revision of its own")
        entry = rollback_from(registry, options.engine)
    else:
        checkpoint = find_checkpoint(options.checkpoint, revision=options.revision)
        entry = rollback(registry, checkpoint.digest)
    text = f"{entry.engine_id} is current again, after {entry.previous}"
    print_result(entry, as_json=options.json, text=text)
    return 0


def _gc(argv: Sequence[str]) -> int:
    defaults = Retention()
    parser = _parser("gc", "Remove leftovers, damage, and old engines never promoted.")
    parser.add_argument("--max-age-days", type=float, default=defaults.max_age_days)
    parser.add_argument("--num-promotions", type=int, default=defaults.num_promotions)
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    options = parser.parse_options(argv)
    retention = Retention(max_age_days=options.max_age_days, num_promotions=options.num_promotions)
    act: Callable[[Registry, Retention], Sequence[Garbage]] = (
        find_garbage if options.dry_run else remove_garbage
    )
    found = list(act(Registry(options.engines), retention))
    verb = "would remove" if options.dry_run else "removed"
    lines = [
        f"{verb} {item.path} ({item.reason}, {item.num_bytes / 2**20:,.1f} MiB)" for item in found
    ]
    total = sum(item.num_bytes for item in found) / 2**20
    lines.append(f"{verb} {len(found)} items, {total:,.1f} MiB")
    print_result(found, as_json=options.json, text="\n".join(lines))
    return 0


def _parser(action: str, description: str) -> CommandParser:
    parser = CommandParser(f"engine {action}", description=description)
    parser.add_argument("--engines", default=default_engines_uri(), metavar="URI")
    return parser


def _build_parser() -> CommandParser:
    sample = SampleConfig(catalog=CatalogConfig(uri="unused"))
    parser = _parser("build", "Build an engine, judge it against float32, promote it if it passes.")
    what = parser.add_argument_group("what")
    what.add_argument("--checkpoint", required=True, metavar="ID_OR_DIR", help="the model")
    what.add_argument("--revision", help="hub branch, tag or commit of the checkpoint")
    what.add_argument("--precision", default="fp8", choices=("fp8", "fp16"))
    rows = parser.add_argument_group("rows to calibrate with and to judge by")
    rows.add_argument("--calibrate", required=True, metavar="URI", help="catalog to draw them from")
    rows.add_argument("--rows", type=int, default=sample.num_rows, help="to calibrate with")
    rows.add_argument("--held-out", type=int, default=sample.num_held_out, help="to judge by")
    rows.add_argument("--label-column", metavar="NAME", help="class in words, for zero-shot top-1")
    rows.add_argument("--seed", type=int, default=sample.seed)
    rows.add_argument("--key-column", default="key", metavar="NAME")
    rows.add_argument("--image-column", metavar="NAME")
    rows.add_argument("--text-column", metavar="NAME")
    add_fetch_options(parser)
    gate = parser.add_argument_group("gate")
    for field in fields(Thresholds):
        flag = f"--{field.name.replace('_', '-')}"
        gate.add_argument(flag, type=float, default=field.default, metavar="NUMBER")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--backend", default="auto", choices=WANTED, help="what judges it")
    where.add_argument(
        "--plans-for",
        nargs="*",
        default=[],
        metavar="ARCH",
        help="GPUs (sm_89) to compile for ahead of time, with TensorRT for RTX",
    )
    return parser


ACTIONS: Actions = {
    "build": (_build, "calibrate, quantize, export, compile, judge, promote"),
    "list": (_list, "all engines"),
    "show": (_show, "one engine"),
    "promote": (_promote, "make an engine the current one of its checkpoint"),
    "rollback": (_rollback, "make the one before it current again"),
    "gc": (_gc, "remove what nobody needs"),
}


if __name__ == "__main__":
    run(main, sys.argv[1:])
