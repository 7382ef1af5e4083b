"""What Prometheus saw while an alert should fire, and while it should not; for promtool."""

from collections.abc import Mapping
from typing import Any

RUN = "ray_clipmill_run_{}_timestamp_seconds"
BUILDS = "ray_clipmill_engine_builds_total"
# Those that take hours go by half hours: Prometheus works through every step.
LONG = ("ClipmillRunSlow", "ClipmillSnapshotOld", "ClipmillEngineBuiltAgain")
PHASE = "ray_clipmill_run_phase_timestamp_seconds"
# Of two runs, one after the other: a driver has a name of its own, and Ray's session.
FIRST, SECOND = 'SessionName="1",WorkerId="01"', 'SessionName="2",WorkerId="01"'
TWO_RUNS = {
    RUN.format("start") + f'{{store="a",{FIRST}}}': "60x2",
    RUN.format("end") + f'{{store="a",outcome="committed",{FIRST}}}': "_x3 200x2",
    RUN.format("start") + f'{{store="a",{SECOND}}}': "_x10 600x2",
    RUN.format("end") + f'{{store="a",outcome="committed",{SECOND}}}': "_x13 800x2",
}


def told_twice(metric: str, labels: str, first: float | None, second: float | None) -> dict:
    """What two runs told near their ends; None: nothing."""
    series = {}
    if first is not None:
        series[f'{metric}{{store="a",{labels}{FIRST}}}'] = f"_x2 {first}x2"
    if second is not None:
        series[f'{metric}{{store="a",{labels}{SECOND}}}'] = f"_x12 {second}x2"
    return series


def recalls(first: float, second: float) -> dict[str, str]:
    """Of the images' index that two runs left; the better of its queries is the texts'."""
    recall = "ray_clipmill_index_recall_ratio"
    return {
        **TWO_RUNS,
        **told_twice(recall, 'modality="image",queries="image",', first, second),
        **told_twice(recall, 'modality="image",queries="text",', 0.99, 0.99),
        **told_twice("ray_clipmill_index_target_recall_ratio", 'modality="image",', 0.95, 0.95),
    }


# Alert, and what is particular -> minutes or half hours after which it is looked at, series (a
# sample for each) that fire it, and series that do not.
SCENES: Mapping[str, tuple[int, Mapping[str, str], Mapping[str, str]]] = {
    "ClipmillRunFailed": (
        20,
        {
            RUN.format("end") + '{store="a",outcome="committed"}': "100x3",
            RUN.format("end") + '{store="a",outcome="failed"}': "_x8 600x2",
        },
        {
            RUN.format("end") + '{store="a",outcome="failed"}': "100x3",
            RUN.format("end") + '{store="a",outcome="unchanged"}': "_x8 600x2",
        },
    ),
    "ClipmillRunDied": (
        20,
        {
            RUN.format("end") + '{store="a",outcome="committed"}': "30 stale",
            RUN.format("start") + '{store="a"}': "60x2 stale",
        },
        {
            RUN.format("end") + '{store="a",outcome="unchanged"}': "_x3 200 stale",
            RUN.format("start") + '{store="a"}': "60x2 stale",
        },
    ),
    "ClipmillRunFailed, stopped": (
        20,
        {
            RUN.format("end") + '{store="a",outcome="failed"}': "100x3",
            RUN.format("end") + '{store="a",outcome="stopped"}': "_x8 600x2",
        },
        {
            RUN.format("end") + '{store="a",outcome="committed"}': "100x3",
            RUN.format("end") + '{store="a",outcome="stopped"}': "_x8 600x2",
        },
    ),
    "ClipmillRunDied, stopped": (
        20,
        {
            RUN.format("end") + '{store="a",outcome="stopped"}': "30 stale",
            RUN.format("start") + '{store="a"}': "60x2 stale",
        },
        {
            RUN.format("end") + '{store="a",outcome="stopped"}': "_x3 200 stale",
            RUN.format("start") + '{store="a"}': "60x2 stale",
        },
    ),
    "ClipmillRunStuck": (
        60,
        {
            PHASE + '{store="a",phase="embed"}': "60x120",
            'ray_clipmill_stage_rows_total{store="a",stage="encode"}': "100x120",
            'ray_clipmill_stage_queue_rows{store="a",stage="encode"}': "5x120",
        },
        {
            PHASE + '{store="a",phase="embed"}': "60x120",
            'ray_clipmill_stage_rows_total{store="a",stage="encode"}': "0+10x120",
            'ray_clipmill_stage_queue_rows{store="a",stage="encode"}': "5x120",
        },
    ),
    "ClipmillRunStuck, before its first row": (
        60,
        {
            PHASE + '{store="a",phase="embed"}': "60x120",
            'ray_clipmill_stage_queue_rows{store="a",stage="read"}': "5x120",
        },
        {
            PHASE + '{store="a",phase="embed"}': "2400x120",  # 20 minutes ago
            'ray_clipmill_stage_queue_rows{store="a",stage="read"}': "5x120",
        },
    ),
    "ClipmillRunStuck, indexing": (
        60,
        {
            PHASE + '{store="a",phase="plan"}': "60x4 stale",
            PHASE + '{store="a",phase="embed"}': "_x5 300x120",
            'ray_clipmill_stage_rows_total{store="a",stage="encode"}': "100x120",
            'ray_clipmill_stage_queue_rows{store="a",stage="encode"}': "5x120",
        },
        {
            PHASE + '{store="a",phase="embed"}': "60x4 stale",
            PHASE + '{store="a",phase="index"}': "_x5 300x120",
            'ray_clipmill_stage_rows_total{store="a",stage="encode"}': "100x120",
            'ray_clipmill_stage_queue_rows{store="a",stage="encode"}': "5x120",
        },
    ),
    "ClipmillRunSlow": (
        18,
        {RUN.format("start") + '{store="a"}': "60x30"},
        {RUN.format("start") + '{store="a"}': "18000x30"},
    ),
    "ClipmillManyRejects": (
        40,
        {
            'ray_clipmill_rejects_total{store="a",reason="fetch_failed"}': "0+6x60",
            'ray_clipmill_stage_rows_total{store="a",stage="write"}': "0+100x60",
        },
        {
            'ray_clipmill_rejects_total{store="a",reason="fetch_failed"}': "0+4x60",
            'ray_clipmill_stage_rows_total{store="a",stage="write"}': "0+100x60",
        },
    ),
    "ClipmillSnapshotOld": (
        54,
        {'ray_clipmill_snapshot_timestamp_seconds{store="a"}': "60x10"},
        {
            'ray_clipmill_snapshot_timestamp_seconds{store="a"}': "60x10",
            RUN.format("end") + '{store="a",outcome="unchanged"}': "_x46 84000x2",
        },
    ),
    "ClipmillServedSnapshotOld": (
        20,
        {'clipmill_snapshot_age_seconds{instance="a"}': "200000+60x30"},
        {'clipmill_snapshot_age_seconds{instance="a"}': "60+60x30"},
    ),
    "ClipmillServiceBehind": (
        30,
        {'clipmill_snapshot_behind{instance="a"}': "1x60"},
        {'clipmill_snapshot_behind{instance="a"}': "0x60"},
    ),
    "ClipmillRecallLow": (30, recalls(0.97, 0.93), recalls(0.93, 0.97)),
    "ClipmillGpuIdle": (
        40,
        {
            'ray_clipmill_stage_busy_seconds_total{store="a",stage="decode"}': "0+114x60",
            'ray_clipmill_stage_workers{store="a",stage="decode"}': "2x60",
            'ray_node_gpus_utilization{GpuIndex="0"}': "30x60",
        },
        {
            'ray_clipmill_stage_busy_seconds_total{store="a",stage="decode"}': "0+114x60",
            'ray_clipmill_stage_workers{store="a",stage="decode"}': "2x60",
            'ray_node_gpus_utilization{GpuIndex="0"}': "80x60",
        },
    ),
    "ClipmillEngineBuiltAgain": (
        146,
        {
            f'{BUILDS}{{store="a",what="engine",WorkerId="{night}"}}': f"_x{steps} 1x2"
            for night, steps in enumerate((45, 93, 141))
        },
        {
            # One that was built before, on a node that is still there, and two of the last days.
            f'{BUILDS}{{store="a",what="engine",WorkerId="0"}}': "1x200",
            f'{BUILDS}{{store="a",what="engine",WorkerId="1"}}': "_x93 1x80",
            f'{BUILDS}{{store="a",what="engine",WorkerId="2"}}': "_x141 1x2",
        },
    ),
    "ClipmillDiskFull": (
        20,
        {'ray_node_disk_utilization_percentage{NodeAddress="a"}': "95x30"},
        {'ray_node_disk_utilization_percentage{NodeAddress="a"}': "60x30"},
    ),
}


def scene(
    series: Mapping[str, str],
    expected: Mapping[str, list],
    *,
    steps: int,
    minutes: int = 1,
    name: str = "",
) -> dict[str, Any]:
    """A test of promtool's: series, and what queries have after so many steps."""
    return {
        "name": name,
        "interval": f"{minutes}m",
        "input_series": [{"series": key, "values": values} for key, values in series.items()],
        "promql_expr_test": [
            {"expr": query, "eval_time": f"{steps * minutes}m", "exp_samples": samples}
            for query, samples in expected.items()
        ],
    }
