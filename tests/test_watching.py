"""Dashboard, alert rules and scrape example: by the names that exist, and by promtool."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.metrics_agent import Gauge
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from jobs.serving.metrics import Metrics
from pipelines.metrics import METRICS
from tests.alert_scenes import MINUTES, SCENES, begun, promtool_test, recalls, told_twice
from tests.prometheus import (
    ALERTS,
    DASHBOARD,
    DEPLOY,
    alert_rules,
    installed,
    panel_queries,
    selectors,
)

# Those that Ray adds to each of ours.
OF_WORKERS = {"SessionName", "WorkerId"}
# Ray's core measures it, not its reporter, and names nodes by another label.
OF_RAYS_CORE = {"ray_object_store_used_memory": {"NodeAddress"}}


def declared() -> dict[str, set[str]]:
    """Every name that may be asked for -> its labels."""
    names = {f"ray_{metric.name}": {*metric.labels, *OF_WORKERS} for metric in METRICS}
    names |= {f"ray_{name}": reported_labels(gauge) for name, gauge in METRICS_GAUGES.items()}
    names |= OF_RAYS_CORE
    for family in Metrics().registry.collect():
        names |= {f"{family.name}{end}": set() for end in ("", "_total", "_bucket")}
    return names


def reported_labels(gauge: Gauge) -> set[str]:
    """Of what Ray's reporter says of a node; Ray keeps them to itself."""
    return {str(label) for label in gauge._view.columns}


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
    known = {"instance"}.union(*(names.get(selector.name, set()) for selector in selectors(query)))
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
        ("max by (NodeAddress) (ray_node_mem_used)", ["no label NodeAddress"]),
        ("max by (WorkerId) (ray_node_mem_used)", ["no label WorkerId"]),
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


def promtool_on(
    folder: Path, content: Any, *words: str, name: str = "file.yaml"
) -> subprocess.CompletedProcess[str]:
    """What it says of a file with this content, text or what YAML is made of."""
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    (folder / name).write_text(text)
    return promtool(*words, str(folder / name))


def test_promtool_takes_the_configuration_and_the_rules():
    done = promtool("check", "config", str(DEPLOY / "prometheus.yaml"))
    assert done.returncode == 0, done.stderr
    assert f"{len(alert_rules())} rules found" in done.stdout


def test_promtool_finds_faults(tmp_path: Path):
    rules = ALERTS.read_text().replace("[3d]))", "[3d)", 1)
    assert promtool_on(tmp_path, rules, "check", "rules").returncode != 0


def test_prometheus_reads_the_dashboards_queries(tmp_path: Path):
    rules = [{"record": "r", "expr": query} for query in panel_queries().values()]
    groups = {"groups": [{"name": "g", "rules": rules}]}
    done = promtool_on(tmp_path, groups, "check", "rules", "--lint=none")
    assert done.returncode == 0, done.stderr


def test_every_alert_has_a_scene():
    assert {test["name"] for test in SCENES} == {rule["alert"] for rule in alert_rules()}


@pytest.mark.parametrize("is_long", [False, True])
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path, is_long: bool):
    tests = [test for test in SCENES if (test["name"] in MINUTES) == is_long]
    interval = tests[0]["interval"]
    scenes = {"rule_files": [str(ALERTS)], "evaluation_interval": interval, "tests": tests}
    done = promtool_on(tmp_path, scenes, "test", "rules")
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def test_panels_show_what_the_latest_run_told(tmp_path: Path):
    panels = panel_queries()
    series = {
        **recalls(0.97, 0.93),
        **told_twice("snapshot_rows", 'modality="image"', 900, 800),
        **told_twice("snapshot_rejects", 'reason="null_image"', 3, 1),
        **told_twice("snapshot_rejects", 'reason="fetch_failed"', 7, None),
    }
    image = 'store="a",modality="image"'
    expected = {
        "Index recall A": {f'{image},queries="image"': 0.93, f'{image},queries="text"': 0.99},
        "Index recall B": {image: 0.95},
        "Embeddings A": {image: 800},
        "Rejects in the snapshot A": {'store="a",reason="null_image"': 1},
    }
    # A run that has told nothing yet, or that does not index, leaves what was told before.
    third = begun("_x20 1200x20", 'SessionName="3",WorkerId="01"')
    scenes = [
        promtool_test(
            {**series, **more},
            {
                panels[title]: [
                    {"labels": f"{{{labels}}}", "value": value} for labels, value in found.items()
                ]
                for title, found in expected.items()
            },
            steps=30,
        )
        for more in ({}, third)
    ]
    done = promtool_on(tmp_path, {"evaluation_interval": "1m", "tests": scenes}, "test", "rules")
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
