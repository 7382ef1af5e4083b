"""`clipmill bench`: measures encoders, the pipeline, the answers of a store, or fidelity.

Knows nothing of how to make any of it faster or better.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.backends.choice import WANTED
from engine.registry import default_engines_uri
from jobs.benches.search_commands import index, query, serve
from jobs.command import Actions, CommandParser, dispatch, print_result, run, say
from jobs.demo.run import CHECKPOINT_DIR
from jobs.logs import event_log
from jobs.progress import shown_steps
from pipelines.engines import EngineChoice
from pipelines.schema import WANTED_DECODERS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return dispatch("bench", BENCHES, argv)


def _encode(argv: Sequence[str]) -> int:
    # torch and transformers are heavy; other benches do without.
    from jobs.benches.encode import BATCH_SIZES, EncodeConfig, measure_encode
    from jobs.benches.encode_figures import encode_lines, timing_lines
    from jobs.benches.encode_page import render_encode_page

    parser = CommandParser(
        "bench encode", description="Speed of an engine over batch sizes, beside transformers."
    )
    _add_engine(parser)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(BATCH_SIZES))
    parser.add_argument("--seconds", type=float, default=2.0, help="of calls of each batch size")
    parser.add_argument("--page", metavar="FILE", help="write plots there, as one HTML page")
    options = parser.parse_options(argv)
    config = EncodeConfig(
        engine=_engine_choice(options),
        batch_sizes=tuple(options.batch_sizes),
        seconds=options.seconds,
    )
    with event_log("bench encode"), shown_steps() as on_progress:
        for figures in measure_encode(config, on_progress=on_progress):
            say(*timing_lines(figures.encoders[-1]))
            if options.page:
                Path(options.page).write_text(render_encode_page(figures), encoding="utf-8")
    lines = encode_lines(figures)
    if options.page:
        lines.append(f"plots: {options.page}")
    print_result(figures, as_json=options.json, text="\n".join(lines))
    return 0


def _decode(argv: Sequence[str]) -> int:
    from jobs.benches.decode import BATCH_SIZES, DecodeConfig, decode_lines, measure_decode

    parser = CommandParser(
        "bench decode", description="Speed of decoding and resizing, by CPU cores and by a GPU."
    )
    parser.add_argument("--catalog", required=True, metavar="URI", help="images")
    _add_engine(parser)
    parser.add_argument("--images", type=int, default=512, metavar="N", help="distinct ones")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(BATCH_SIZES))
    options = parser.parse_options(argv)
    config = DecodeConfig(
        catalog_uri=options.catalog,
        engine=_engine_choice(options),
        num_images=options.images,
        batch_sizes=tuple(options.batch_sizes),
    )
    figures = measure_decode(config)
    print_result(figures, as_json=options.json, text="\n".join(decode_lines(figures)))
    return 0


def _stage(argv: Sequence[str]) -> int:
    from jobs.benches.stage import StageConfig, measure_stage, stage_line
    from pipelines.stages import CALLS_OF_GPU_ENCODER

    parser = CommandParser(
        "bench stage", description="Speed of decoding and encoding side by side, in one process."
    )
    parser.add_argument("--catalog", required=True, metavar="URI", help="images")
    _add_engine(parser)
    parser.add_argument("--decode", default="auto", choices=WANTED_DECODERS)
    parser.add_argument("--images", type=int, default=512, metavar="N", help="distinct ones")
    parser.add_argument("--batch-rows", type=int, help="of a call; by itself as embed has them")
    parser.add_argument("--calls", type=int, default=CALLS_OF_GPU_ENCODER, help="at once")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_options(argv)
    config = StageConfig(
        catalog_uri=options.catalog,
        engine=replace(_engine_choice(options), decoder=options.decode),
        num_images=options.images,
        batch_rows=options.batch_rows,
        num_calls=options.calls,
        seconds=options.seconds,
        num_runs=options.runs,
    )
    figures = measure_stage(config)
    print_result(figures, as_json=options.json, text=stage_line(figures))
    return 0


def _pipeline(argv: Sequence[str]) -> int:
    from jobs.benches.pipeline import (
        PipelineConfig,
        measure_baseline,
        measure_pipeline,
        pipeline_lines,
    )
    from jobs.benches.repeated_images import RepeatedImages

    parser = CommandParser("bench pipeline", description="Speed and memory over catalog sizes.")
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000, 50_000])
    _add_engine(parser)
    parser.add_argument("--decode", default="auto", choices=WANTED_DECODERS)
    parser.add_argument(
        "--images", metavar="URI", help="a catalog whose images are repeated; or else drawn scenes"
    )
    parser.add_argument(
        "--damaged", type=float, default=0.0, metavar="SHARE", help="of --images, cut in half"
    )
    parser.add_argument(
        "--runs", type=int, default=1, help="of each size; the one of median time counts"
    )
    parser.add_argument(
        "--baseline", action="store_true", help="Ray Data with Pillow and transformers beside it"
    )
    options = parser.parse_options(argv)
    if options.damaged and options.baseline:
        raise ValueError("--baseline takes no damaged images: leave --damaged out")
    if options.baseline and options.engine:
        raise ValueError("--baseline loads a checkpoint: name --checkpoint, not --engine")
    if options.damaged and not options.images:
        raise ValueError("--damaged is a share of --images")
    images = None
    if options.images:
        images = RepeatedImages(catalog_uri=options.images, damaged_share=options.damaged)
    programs = [measure_pipeline, *([measure_baseline] if options.baseline else [])]
    engine = replace(_engine_choice(options), decoder=options.decode)
    figures = []
    try:
        for num_rows in options.rows:
            config = PipelineConfig(
                num_rows=num_rows, engine=engine, images=images, num_runs=options.runs
            )
            for measure in programs:
                figures += [measure(config, on_run=say)]
    finally:
        # One that comes later may fail, or take longer than anybody waits.
        if figures:
            print_result(figures, as_json=options.json, text="\n".join(pipeline_lines(figures)))
    return 0


def _plan(argv: Sequence[str]) -> int:
    from jobs.benches.plan import PlanConfig, measure_plan, plan_line

    parser = CommandParser(
        "bench plan", description="Time and memory to find what changed in a catalog of many keys."
    )
    parser.add_argument("--keys", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--changed", type=float, default=0.01, metavar="SHARE")
    options = parser.parse_options(argv)
    figures = [
        measure_plan(PlanConfig(num_keys=keys, changed_share=options.changed))
        for keys in options.keys
    ]
    print_result(figures, as_json=options.json, text="\n".join(map(plan_line, figures)))
    return 0


def _nights(argv: Sequence[str]) -> int:
    from jobs.benches.nights import NightsConfig, measure_nights, nights_lines

    parser = CommandParser(
        "bench nights", description="Time and memory of nights, by what changed before them."
    )
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--changed", type=float, default=0.01, metavar="SHARE")
    _add_engine(parser)
    options = parser.parse_options(argv)
    figures = measure_nights(
        NightsConfig(
            num_keys=options.keys,
            engine=_engine_choice(options),
            changed_share=options.changed,
        )
    )
    print_result(figures, as_json=options.json, text="\n".join(nights_lines(figures)))
    return 0


def _agreement(argv: Sequence[str]) -> int:
    from jobs.benches.agreement import agreement_line, measure_agreement

    parser = CommandParser(
        "bench agreement", description="Cosine of an fp32 engine's embeddings to transformers' own."
    )
    parser.add_argument("--catalog", required=True, metavar="URI", help="images and texts")
    parser.add_argument("--rows", type=int, default=200, help="compared")
    parser.add_argument("--checkpoint", default=str(CHECKPOINT_DIR), metavar="ID_OR_DIR")
    parser.add_argument("--engines", default=default_engines_uri(), metavar="URI")
    options = parser.parse_options(argv)
    agreements = measure_agreement(
        options.checkpoint,
        catalog_uri=options.catalog,
        num_rows=options.rows,
        engines_uri=options.engines,
    )
    text = "\n".join(map(agreement_line, agreements))
    print_result(agreements, as_json=options.json, text=text)
    return 0


def _add_engine(parser: CommandParser) -> None:
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--checkpoint", metavar="ID_OR_DIR", help="its promoted engine, or fp32")
    model.add_argument("--engine", metavar="ID", help="one engine, by its id")
    parser.add_argument("--engines", default=default_engines_uri(), metavar="URI")
    parser.add_argument("--backend", default="auto", choices=WANTED)


def _engine_choice(options: Namespace) -> EngineChoice:
    """What `_add_engine` asked for; the demo's checkpoint if nothing was."""
    return EngineChoice(
        checkpoint=options.checkpoint or (None if options.engine else str(CHECKPOINT_DIR)),
        engine_id=options.engine,
        backend=options.backend,
        engines_uri=options.engines,
    )


BENCHES: Actions = {
    "encode": (_encode, "an engine over batch sizes, beside transformers"),
    "decode": (_decode, "images to pixels, by CPU cores and by a GPU"),
    "stage": (_stage, "decoding and encoding side by side, in one process"),
    "pipeline": (_pipeline, "speed and memory of embed over catalog sizes"),
    "plan": (_plan, "time and memory to find what changed in a catalog"),
    "nights": (_nights, "time and memory of nights, by what changed"),
    "index": (index, "time, memory and recall of an index, built and changed"),
    "serve": (serve, "requests a second of the service, and how long they take"),
    "query": (query, "recall of the pairs of a store"),
    "agreement": (_agreement, "cosine of an engine's embeddings to transformers' own"),
}


if __name__ == "__main__":
    run(main, sys.argv[1:])
