"""What a night on a real Ray tells: scraped as text, and by a real Prometheus if there is one."""

import re
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import prometheus_client
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from jobs.serving.metrics import Metrics
from pipelines.catalog import CatalogConfig
from pipelines.embedding import EmbedConfig
from pipelines.engines import EngineChoice
from pipelines.metrics import METRICS, RUN_END, put
from pipelines.nightly import NightlyConfig, run_night
from pipelines.progress import STAGES
from pipelines.runs.report import RunReport, make_report
from pipelines.runs.run_metrics import told_run
from pipelines.store_places import store_label
from tests.catalogs import scene_rows, write_rows
from tests.prometheus import alert_rules, panel_queries, prometheus, selectors
from tests.stored import index_manifest
from tests.waiting import WAIT_SECONDS

BAD_ROWS = [
    {"key": "b1", "image": b"no image", "text": "a red bicycle"},
    {"key": "b2", "image": b"", "text": " "},
    {"key": None, "image": b"", "text": "a cat"},
]
ON_GPUS = ("ray_node_gpus_utilization", "ray_node_gram_used")


@dataclass
class ToldNight:
    store_uri: str
    report: RunReport
    recall: dict[tuple[str, str], float]
    during: dict[str, dict[frozenset, float]]
    after: dict[str, dict[frozenset, float]]

    @property
    def store(self) -> str:
        return store_label(self.store_uri)

    def of(self, name: str, *labels: str) -> dict:
        """Values of labels -> sum over all processes."""
        found: Counter = Counter()
        for pairs, value in self.after[f"ray_{name}"].items():
            assert dict(pairs)["store"] == self.store
            found[tuple(dict(pairs)[label] for label in labels)] += value
        return dict(found)


def scraped(target: str) -> dict[str, dict[frozenset, float]]:
    """Name of a sample -> its labels -> value."""
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=WAIT_SECONDS) as answer:
        text = answer.read().decode()
    found: dict[str, dict[frozenset, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def scraped_with(target: str, *names: str, store: str) -> dict[str, dict[frozenset, float]]:
    """The same, once samples of these names and this store are there."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        found = scraped(target)
        lacking = [
            name
            for name in names
            if not any(("store", store) in labels for labels in found.get(name, {}))
        ]
        if not lacking:
            return {
                name: {
                    pairs: value for pairs, value in samples.items() if ("store", store) in pairs
                }
                for name, samples in found.items()
            }
        assert time.monotonic() < deadline, f"never told: {lacking}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def target(local_ray: None) -> str:
    (node,) = ray.nodes()
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory, checkpoint_dir: Path, target: str) -> ToldNight:
    folder = tmp_path_factory.mktemp("told") / "night"
    rows = [*scene_rows(60), *BAD_ROWS]
    config = NightlyConfig(
        embed=EmbedConfig(
            catalog=CatalogConfig(uri=str(write_rows(folder / "catalog", rows))),
            store_uri=str(folder / "store"),
            engine=EngineChoice(
                checkpoint=str(checkpoint_dir), engines_uri=str(folder / "engines")
            ),
        )
    )
    store = store_label(config.embed.store_uri)
    with told_run(config.embed.store_uri) as told:
        result = run_night(config)
        names = [f"ray_{metric.name}" for metric in METRICS if metric != RUN_END]
        during = scraped_with(target, *names, store=store)
        told.outcome = "committed"
    told_night = ToldNight(
        store_uri=config.embed.store_uri,
        report=make_report(
            result.embedded, catalog_uri="catalog", store_uri=config.embed.store_uri
        ),
        recall={
            (index.modality, kind): recall
            for index in result.indexes
            for kind, recall in index.recall_at(10).items()
        },
        during=during,
        after={},
    )
    # Each process exports in its own time; what is never told, the tests say.
    num_rows = sum(stage.num_rows for stage in told_night.report.stages)
    deadline = time.monotonic() + WAIT_SECONDS
    is_told = False
    while not is_told and time.monotonic() < deadline:
        told_night.after = scraped_with(target, f"ray_{RUN_END.name}", store=store)
        is_told = sum(told_night.of("clipmill_stage_rows_total").values()) >= num_rows
        time.sleep(0.5)
    return told_night


def test_every_metric_is_told(night: ToldNight):
    told = night.during.keys() | night.after.keys()
    assert {f"ray_{metric.name}" for metric in METRICS} <= told


def test_stages_tell_what_the_report_says(night: ToldNight):
    stages = {(stage.stage,): stage for stage in night.report.stages}
    assert night.of("clipmill_stage_rows_total", "stage") == {
        stage: report.num_rows for stage, report in stages.items()
    }
    assert stages["write",].num_rows == 2 * 62
    assert night.of("clipmill_stage_bytes_total", "stage") == {
        stage: report.num_bytes for stage, report in stages.items() if report.num_bytes
    }
    for name, of_report in (("busy", "busy_seconds"), ("core", "core_seconds")):
        assert night.of(f"clipmill_stage_{name}_seconds_total", "stage") == {
            stage: pytest.approx(getattr(report, of_report)) for stage, report in stages.items()
        }
    assert night.of("clipmill_encoded_rows_total", "modality") == {("image",): 60, ("text",): 61}


def test_rejects_are_told_by_reason(night: ToldNight):
    assert night.of("clipmill_rejects_total", "modality", "reason") == {
        ("image", "not_an_image"): 1,
        ("image", "empty_image"): 1,
        ("text", "empty_text"): 1,
    }
    # The driver rejects rows without a key, which no stage sees.
    assert night.report.rejects_by_reason["null_key"] == 1
    assert night.of("clipmill_snapshot_rejects", "reason") == {
        (reason,): num_rows for reason, num_rows in night.report.rejects_by_reason.items()
    }


def test_engines_are_told(night: ToldNight):
    assert night.of("clipmill_engine_builds_total", "what") == {("engine",): 1}
    (build_seconds,) = night.of("clipmill_engine_build_seconds_total", "what").values()
    assert 0.1 < build_seconds < 300
    (num_loads,) = night.of("clipmill_engine_loads_total").values()
    assert num_loads >= 1
    assert 0 < night.of("clipmill_engine_load_seconds_total")[()] < 300


def test_the_snapshot_and_its_index_are_told(night: ToldNight):
    assert night.of("clipmill_snapshot_number") == {(): 1}
    (committed,) = night.of("clipmill_snapshot_timestamp_seconds").values()
    (ended,) = night.of("clipmill_run_end_timestamp_seconds", "outcome").values()
    assert night.of("clipmill_run_end_timestamp_seconds", "outcome").keys() == {("committed",)}
    assert time.time() - 600 < committed <= ended <= time.time()
    assert night.of("clipmill_snapshot_rows", "modality") == {("image",): 60, ("text",): 61}
    assert night.recall
    assert night.of("clipmill_index_recall_ratio", "modality", "queries") == night.recall
    assert night.of("clipmill_index_target_recall_ratio", "modality") == {
        ("image",): 0.95,
        ("text",): 0.95,
    }


def test_a_run_under_way_tells_its_plan(night: ToldNight):
    def during(name: str, label: str) -> dict[str, float]:
        return {dict(pairs)[label]: value for pairs, value in night.during[f"ray_{name}"].items()}

    assert during("clipmill_planned_rows", "modality") == {"image": 62, "text": 62}
    assert during("clipmill_stage_queue_rows", "stage") == dict.fromkeys(STAGES, 0)
    assert during("clipmill_stage_workers", "stage").keys() == set(STAGES)
    ((_, started),) = night.during["ray_clipmill_run_start_timestamp_seconds"].items()
    ((_, ended),) = night.after["ray_clipmill_run_end_timestamp_seconds"].items()
    assert ended - 600 < started < ended


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """The metrics of a service, which answers from a snapshot committed an hour ago."""
    metrics = Metrics()
    metrics.answers_from(number=1, created_seconds=time.time() - 3600)
    metrics.finds(index_manifest(image=0.97))
    metrics.families()
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", metrics.registry)
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_real_prometheus_answers_dashboard_and_alerts(
    tmp_path: Path, night: ToldNight, target: str, service: str
):
    queries = panel_queries()
    for rule in alert_rules():
        for selector in selectors(rule["expr"]):
            queries[f"{rule['alert']} {selector.name}"] = f"last_over_time({selector.name}[5m])"
        if rule["alert"] == "ClipmillDiskFull":  # the one of Ray's own labels
            queries[rule["alert"]] = rule["expr"].partition(" > ")[0]
    store = night.store
    with prometheus(tmp_path, targets=[target, service]) as server, told_run(night.store_uri):
        tell_again(night)
        deadline = time.monotonic() + WAIT_SECONDS
        empty = list(queries)
        while empty:
            assert time.monotonic() < deadline, f"no series: {empty}"
            time.sleep(1)
            empty = [
                title
                for title in empty
                if not any(name in queries[title] for name in ON_GPUS)
                and not server.query(queries[title])
            ]
        for title, query in queries.items():
            # Other tests told of no store.
            for found in server.query(query.replace('store=~".*"', f'store="{store}"')):
                assert grouped_by(query) <= found["metric"].keys(), (title, found)
        assert {rule["health"] for rule in server.rules()} == {"ok"}
        firing = [rule["name"] for rule in server.rules() if rule["state"] == "firing"]
        assert not set(firing) - {"ClipmillDiskFull"}
        expected = {stage.stage: stage.num_rows for stage in night.report.stages}
        told: dict[str, float] = {}
        while told != expected and time.monotonic() < deadline:
            time.sleep(0.5)
            rows = f'sum by (stage) (ray_clipmill_stage_rows_total{{store="{store}"}})'
            told = {
                found["metric"]["stage"]: float(found["value"][1]) for found in server.query(rows)
            }
        assert told == expected


def grouped_by(query: str) -> set[str]:
    """Labels by which it asks for a series each; Prometheus leaves out those that are empty."""
    outermost = re.search(r"\bby \(([^)]*)\)", query)
    return set(outermost[1].replace(" ", "").split(",")) if outermost else set()


def tell_again(night: ToldNight) -> None:
    """The gauges of a run under way, which Ray has forgotten by now."""
    for metric in METRICS:
        if metric.kind == "gauge":
            for samples in (night.during, night.after):
                for pairs, value in samples.get(f"ray_{metric.name}", {}).items():
                    labels = dict(pairs)
                    put(metric, value, {name: labels[name] for name in metric.labels})
