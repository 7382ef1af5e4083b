"""Dashboard, alert rules and scrape example: by the names that exist, and by promtool."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from jobs.serving.metrics import Metrics
from pipelines.metrics import METRICS
from tests.prometheus import (
    ALERTS,
    DASHBOARD,
    DEPLOY,
    alert_rules,
    installed,
    panel_queries,
    selectors,
)

# Ray's labels, and Prometheus's own.
RAYS_LABELS = {"NodeAddress", "GpuIndex", "GpuDeviceName", "instance"}
# Ray's core measures it, not its reporter.
OF_RAYS_CORE = {"ray_object_store_used_memory"}


def declared() -> dict[str, set[str]]:
    """Every name that may be asked for -> its labels."""
    names = {f"ray_{metric.name}": set(metric.labels) for metric in METRICS}
    names |= {f"ray_{name}": set() for name in METRICS_GAUGES}
    names |= {name: set() for name in OF_RAYS_CORE}
    for family in Metrics().registry.collect():
        names |= {f"{family.name}{end}": set() for end in ("", "_total", "_bucket")}
    return names


def faults(query: str) -> list[str]:
    """What a query asks for that nobody tells."""
    names = declared()
    found = []
    for selector in selectors(query):
        if selector.name not in names:
            found.append(f"no metric {selector.name}")
            continue
        labels = {matcher.name for matcher in selector.matchers.matchers}
        found += [
            f"{selector.name} has no label {label}" for label in labels - names[selector.name]
        ]
    asked: set[str] = set()
    for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
        asked |= {label.strip() for label in group.split(",") if label.strip()}
    known = RAYS_LABELS.union(*(names.get(selector.name, set()) for selector in selectors(query)))
    return found + [f"no label {label}" for label in asked - known]


def test_the_dashboard_asks_for_what_is_told():
    for title, query in panel_queries().items():
        assert "$" not in query, title
        assert list(selectors(query)), title
        assert faults(query) == [], title


@pytest.mark.parametrize("rule", alert_rules(), ids=lambda rule: rule["alert"])
def test_alerts_ask_for_what_is_told(rule: dict[str, Any]):
    assert list(selectors(rule["expr"]))
    assert faults(rule["expr"]) == []
    labels = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
    assert labels <= set(re.findall(r"\w+", rule["expr"]))


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("sum(rate(ray_clipmill_rows_total[5m]))", ["no metric ray_clipmill_rows_total"]),
        ("clipmill_stage_rows_total", ["no metric clipmill_stage_rows_total"]),
        (
            'max by (store) (ray_clipmill_stage_rows_total{modality="image"})',
            ["ray_clipmill_stage_rows_total has no label modality"],
        ),
        ("sum by (reason) (ray_clipmill_stage_rows_total)", ["no label reason"]),
        (
            "a > on (store) (max(last_over_time(b[1h])) or -rate(c[1h:5m]))",
            ["no metric a", "no metric b", "no metric c", "no label store"],
        ),
    ],
)
def test_what_nobody_tells_is_found(query: str, found: list[str]):
    assert sorted(faults(query)) == sorted(found)


def test_everything_that_is_told_is_shown():
    asked = {s.name for query in panel_queries().values() for s in selectors(query)}
    assert {f"ray_{metric.name}" for metric in METRICS} <= asked


def test_panels_are_apart_and_whole():
    places = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        for x in range(grid["x"], grid["x"] + grid["w"]):
            for y in range(grid["y"], grid["y"] + grid["h"]):
                assert (x, y) not in places, panel["title"]
                places.add((x, y))
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    (store,) = [one for one in DASHBOARD["templating"]["list"] if one["name"] == "store"]
    name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", store["definition"]).groups()
    assert label in declared()[name]


def test_metrics_are_named_as_prometheus_wants():
    for metric in METRICS:
        assert re.fullmatch(r"clipmill_[a-z]+(_[a-z]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert not {"le", "job", "instance"} & set(metric.labels)
        assert metric.help.endswith(".")
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def promtool(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([installed("promtool"), *words], capture_output=True, text=True)


def test_promtool_takes_the_configuration_and_the_rules():
    done = promtool("check", "config", str(DEPLOY / "prometheus.yaml"))
    assert done.returncode == 0, done.stderr
    assert f"{len(alert_rules())} rules found" in done.stdout


def test_promtool_finds_faults(tmp_path: Path):
    rules = ALERTS.read_text().replace("[3d]))", "[3d)", 1)
    (tmp_path / "alerts.yaml").write_text(rules)
    assert promtool("check", "rules", str(tmp_path / "alerts.yaml")).returncode != 0


def test_prometheus_reads_the_dashboards_queries(tmp_path: Path):
    rules = [{"record": "r", "expr": query} for query in panel_queries().values()]
    (tmp_path / "rules.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "g", "rules": rules}]})
    )
    done = promtool("check", "rules", "--lint=none", str(tmp_path / "rules.yaml"))
    assert done.returncode == 0, done.stderr


RUN = "ray_clipmill_run_{}_timestamp_seconds"
BUILDS = "ray_clipmill_engine_builds_total"
# Those that take hours go by half hours: Prometheus works through every step.
LONG = ("ClipmillRunSlow", "ClipmillSnapshotOld", "ClipmillEngineBuiltAgain")
# Alert -> minutes or half hours after which it is looked at, series (a sample for each) that fire
# it, and series that do not.
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
    "ClipmillRunStuck": (
        60,
        {
            'ray_clipmill_stage_rows_total{store="a",stage="encode"}': "100x120",
            'ray_clipmill_stage_queue_rows{store="a",stage="encode"}': "5x120",
        },
        {
            'ray_clipmill_stage_rows_total{store="a",stage="encode"}': "0+10x120",
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
    "ClipmillRecallLow": (
        30,
        {
            'ray_clipmill_index_recall_ratio{store="a",modality="image",queries="image"}': "0.97x2",
            'ray_clipmill_index_recall_ratio{store="a",modality="image",queries="text"}': "0.93x2",
            'ray_clipmill_index_target_recall_ratio{store="a",modality="image"}': "0.95x2",
        },
        {
            'ray_clipmill_index_recall_ratio{store="a",modality="image",queries="text"}': "0.96x2",
            'ray_clipmill_index_target_recall_ratio{store="a",modality="image"}': "0.95x2",
        },
    ),
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


def test_every_alert_has_a_scene():
    assert SCENES.keys() == {rule["alert"] for rule in alert_rules()}


@pytest.mark.parametrize("minutes", [1, 30])
@pytest.mark.parametrize("fires", [True, False])
def test_alerts_fire_when_they_should(tmp_path: Path, fires: bool, minutes: int):
    tests = []
    for alert, (steps, firing, quiet) in SCENES.items():
        if (alert in LONG) != (minutes > 1):
            continue
        series = firing if fires else quiet
        tests.append(
            {
                "interval": f"{minutes}m",
                "input_series": [
                    {"series": name, "values": values} for name, values in series.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": f"{steps * minutes}m",
                        "exp_samples": (
                            [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if fires else []
                        ),
                    }
                ],
            }
        )
    scenes = {"rule_files": [str(ALERTS)], "evaluation_interval": f"{minutes}m", "tests": tests}
    (tmp_path / "scenes.yaml").write_text(yaml.safe_dump(scenes))
    done = promtool("test", "rules", str(tmp_path / "scenes.yaml"))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
