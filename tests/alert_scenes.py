"""What Prometheus saw while an alert should fire, and while it should not; for promtool."""

from collections.abc import Mapping, Sequence
from typing import Any

Series = Mapping[str, str]
# Steps of a scene take as long. Those of hours go by half hours: Prometheus works through each.
MINUTES = {"ClipmillRunSlow": 30, "ClipmillSnapshotOld": 30, "ClipmillEngineBuiltAgain": 30}
FIRED = 'count by (alertname) (ALERTS{alertstate="firing"})'
# Of two runs, one after the other: a driver has a name of its own, and Ray's session.
FIRST, SECOND = 'SessionName="1",WorkerId="01"', 'SessionName="2",WorkerId="01"'


def promtool_test(
    series: Series,
    expected: Mapping[str, Sequence[Any]],
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


def scene(
    alert: str, steps: int, *, firing: Series, quiet: Series, both: Series | None = None
) -> list[dict[str, Any]]:
    """Two tests, of an alert that alone fires after so many steps, and of none that does.

    Args:
        alert: Its name.
        steps: Of minutes, or of `MINUTES`.
        firing: Series of which it fires, a sample for each step.
        quiet: In the place of these, series of which nothing fires.
        both: Series that are beside either.
    """
    fired = [{"labels": f'{{alertname="{alert}"}}', "value": 1}]
    minutes = MINUTES.get(alert, 1)
    return [
        promtool_test(
            {**(both or {}), **series}, {FIRED: samples}, steps=steps, minutes=minutes, name=alert
        )
        for series, samples in ((firing, fired), (quiet, []))
    ]


def told(metric: str, values: str, labels: str = "") -> dict[str, str]:
    """A series of ours of store `a`."""
    return {f'ray_clipmill_{metric}{{store="a"{labels and ","}{labels}}}': values}


def begun(values: str, labels: str = "") -> dict[str, str]:
    """Runs told that they began."""
    return told("run_start_timestamp_seconds", values, labels)


def ended(outcome: str, values: str, labels: str = "") -> dict[str, str]:
    """Runs told that they ended, and how."""
    labels = f'outcome="{outcome}"{labels and ","}{labels}'
    return told("run_end_timestamp_seconds", values, labels)


def phase(name: str, values: str) -> dict[str, str]:
    """A run told what it does."""
    return told("run_phase_timestamp_seconds", values, f'phase="{name}"')


def stage(metric: str, name: str, values: str) -> dict[str, str]:
    """A stage told something of itself."""
    return told(f"stage_{metric}", values, f'stage="{name}"')


def built(values: Sequence[str]) -> dict[str, str]:
    """Each of several drivers told how many engines it has built."""
    return {
        key: value
        for number, each in enumerate(values)
        for key, value in told(
            "engine_builds_total", each, f'what="engine",WorkerId="{number}"'
        ).items()
    }


def told_twice(
    metric: str, labels: str, first: float | None, second: float | None
) -> dict[str, str]:
    """What two runs told near their ends; None: nothing."""
    series = {}
    if first is not None:
        series |= told(metric, f"_x2 {first}x2", f"{labels},{FIRST}")
    if second is not None:
        series |= told(metric, f"_x12 {second}x2", f"{labels},{SECOND}")
    return series


def recalls(first: float, second: float) -> dict[str, str]:
    """Of the images' index that two runs left; the better of its queries is the texts'."""
    return {
        **begun("60x2", FIRST),
        **ended("committed", "_x3 200x2", FIRST),
        **begun("_x10 600x2", SECOND),
        **ended("committed", "_x13 800x2", SECOND),
        **told_twice("index_recall_ratio", 'modality="image",queries="image"', first, second),
        **told_twice("index_recall_ratio", 'modality="image",queries="text"', 0.99, 0.99),
        **told_twice("index_target_recall_ratio", 'modality="image"', 0.95, 0.95),
    }


WAITING = stage("queue_rows", "encode", "5x120")
STILL = stage("rows_total", "encode", "100x120")

SCENES = [
    *scene(
        "ClipmillRunFailed",
        20,
        firing={**ended("committed", "100x3"), **ended("failed", "_x8 600x2")},
        quiet={**ended("failed", "100x3"), **ended("unchanged", "_x8 600x2")},
    ),
    # That was stopped, after another.
    *scene(
        "ClipmillRunFailed",
        20,
        both=ended("stopped", "_x8 600x2"),
        firing=ended("failed", "100x3"),
        quiet=ended("committed", "100x3"),
    ),
    *scene(
        "ClipmillRunDied",
        20,
        both=begun("60x2 stale"),
        firing=ended("committed", "30 stale"),
        quiet=ended("unchanged", "_x3 200 stale"),
    ),
    *scene(
        "ClipmillRunDied",
        20,
        both=begun("60x2 stale"),
        firing=ended("stopped", "30 stale"),
        quiet=ended("stopped", "_x3 200 stale"),
    ),
    # Within the hour another one begins, and ends.
    *scene(
        "ClipmillRunStopped",
        70,
        both={**begun("60x5 stale", FIRST), **ended("stopped", "_x6 360x3", FIRST)},
        firing={},
        quiet={**begun("_x40 2400x2", SECOND), **ended("committed", "_x43 2580x2", SECOND)},
    ),
    # Too short for its begin to be scraped; the other goes on.
    *scene(
        "ClipmillRunStopped",
        70,
        both=ended("stopped", "_x6 360x3", FIRST),
        firing={},
        quiet=begun("_x40 2400x60", SECOND),
    ),
    # Another one of the same store was under way, and ended later.
    *scene(
        "ClipmillRunStopped",
        130,
        both=ended("stopped", "_x6 360x3", SECOND),
        firing={},
        quiet={**begun("60x60 stale", FIRST), **ended("committed", "_x60 3600x3", FIRST)},
    ),
    # Another one of the same store is under way.
    *scene(
        "ClipmillRunStopped",
        70,
        both=ended("stopped", "_x6 360x3", SECOND),
        firing={},
        quiet=begun("60x120", FIRST),
    ),
    *scene(
        "ClipmillRunStuck",
        60,
        both={**phase("embed", "60x120"), **WAITING},
        firing=STILL,
        quiet=stage("rows_total", "encode", "0+10x120"),
    ),
    # Before its first row; the other began to embed 20 minutes ago.
    *scene(
        "ClipmillRunStuck",
        60,
        both=stage("queue_rows", "read", "5x120"),
        firing=phase("embed", "60x120"),
        quiet=phase("embed", "2400x120"),
    ),
    *scene(
        "ClipmillRunStuck",
        60,
        both={**WAITING, **STILL},
        firing={**phase("plan", "60x4 stale"), **phase("embed", "_x5 300x120")},
        quiet={**phase("embed", "60x4 stale"), **phase("index", "_x5 300x120")},
    ),
    *scene("ClipmillRunSlow", 18, firing=begun("60x30"), quiet=begun("18000x30")),
    *scene(
        "ClipmillManyRejects",
        40,
        both=stage("rows_total", "write", "0+100x60"),
        firing=told("rejects_total", "0+6x60", 'reason="fetch_failed"'),
        quiet=told("rejects_total", "0+4x60", 'reason="fetch_failed"'),
    ),
    *scene(
        "ClipmillSnapshotOld",
        54,
        both=told("snapshot_timestamp_seconds", "60x10"),
        firing={},
        quiet=ended("unchanged", "_x46 84000x2"),
    ),
    *scene(
        "ClipmillServedSnapshotOld",
        20,
        firing={'clipmill_snapshot_age_seconds{instance="a"}': "200000+60x30"},
        quiet={'clipmill_snapshot_age_seconds{instance="a"}': "60+60x30"},
    ),
    *scene(
        "ClipmillServiceBehind",
        30,
        firing={'clipmill_snapshot_behind{instance="a"}': "1x60"},
        quiet={'clipmill_snapshot_behind{instance="a"}': "0x60"},
    ),
    *scene("ClipmillRecallLow", 30, firing=recalls(0.97, 0.93), quiet=recalls(0.93, 0.97)),
    *scene(
        "ClipmillGpuIdle",
        40,
        both={
            **stage("busy_seconds_total", "decode", "0+114x60"),
            **stage("workers", "decode", "2x60"),
        },
        firing={'ray_node_gpus_utilization{GpuIndex="0"}': "30x60"},
        quiet={'ray_node_gpus_utilization{GpuIndex="0"}': "80x60"},
    ),
    # Of the others, one was built before, on a node that is still there, and two of late.
    *scene(
        "ClipmillEngineBuiltAgain",
        146,
        firing=built(["_x45 1x2", "_x93 1x2", "_x141 1x2"]),
        quiet=built(["1x200", "_x93 1x80", "_x141 1x2"]),
    ),
    *scene(
        "ClipmillDiskFull",
        20,
        firing={'ray_node_disk_utilization_percentage{ip="a"}': "95x30"},
        quiet={'ray_node_disk_utilization_percentage{ip="a"}': "60x30"},
    ),
]
