"""How many encoders a run takes, by what is configured and what the cluster has or may get."""

import re
from functools import partial

import pytest
from ray.data import DataContext

from jobs.command import CommandParser
from jobs.embed_options import add_embed_options, embed_config_from
from pipelines.cluster.placement import Placement
from pipelines.cluster.resources import (
    Resources,
    check_room,
    encoder_bounds,
    num_workers,
    wanted_workers,
)
from pipelines.cluster.watched_runs import PlacementCallback
from pipelines.engines import Execution
from pipelines.stages import IN_FLIGHT_BYTES_PER_CPU, ray_data_settings
from tests.clusters import describe_cluster

ON_GPUS = Execution(backend="torch", decoder="gpu")
ON_CPUS = Execution(backend="onnxruntime", decoder="cpu")
L4 = {"CPU": 16.0, "GPU": 1.0, "accelerator_type:L4": 1.0}
H100 = {"CPU": 16.0, "GPU": 2.0, "accelerator_type:H100": 1.0}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch):
    return partial(describe_cluster, monkeypatch)


@pytest.mark.parametrize(
    ("num", "most", "fixed", "growing"),
    [
        (None, None, (3, 3), (1, None)),
        (2, None, (2, 2), (2, 2)),
        (None, 5, (1, 5), (1, 5)),
        (2, 5, (2, 5), (2, 5)),
    ],
)
def test_the_backlog_decides_where_nodes_may_come_or_it_is_asked_for(
    cluster, num: int | None, most: int | None, fixed: tuple, growing: tuple
):
    resources = Resources(num_encoders=num, placement=Placement(max_encoders=most))
    for grows, expected in ((False, fixed), (True, growing)):
        cluster({"CPU": 0.0}, L4, H100, grows=grows)
        assert encoder_bounds(resources, execution=ON_GPUS) == expected


def test_a_type_of_gpu_counts_only_nodes_that_have_it(cluster):
    cluster(L4, H100, grows=False)
    for name, num in (("L4", 1), ("H100", 2), ("T4", 1)):
        resources = Resources(placement=Placement(accelerator_type=name))
        assert num_workers(resources, execution=ON_GPUS)["encode"] == num
    with pytest.raises(ValueError, match="GPUs of type T4 have room for 0 such encoders"):
        check_room(Resources(placement=Placement(accelerator_type="T4")), execution=ON_GPUS)


def test_what_may_come_is_not_missed(cluster):
    cluster({"CPU": 0.0}, grows=True)
    check_room(Resources(num_encoders=8), execution=ON_GPUS)
    cluster({"CPU": 0.0}, grows=False)
    with pytest.raises(ValueError, match="GPUs have room for 0 such encoders"):
        check_room(Resources(num_encoders=8), execution=ON_GPUS)


def test_workers_that_could_be_there_count_for_the_report(cluster):
    cluster(L4, L4, L4, grows=True)
    for most, num in ((None, 3), (2, 2), (8, 3)):
        resources = Resources(placement=Placement(max_encoders=most))
        assert num_workers(resources, execution=ON_GPUS)["encode"] == num


def test_workers_ask_for_what_is_configured():
    resources = Resources(encoder_gpus=0.5, placement=Placement(accelerator_type="H100"))
    encoder, decoding, io = wanted_workers(resources, execution=ON_GPUS)
    assert encoder.resources == {"CPU": 0.5, "GPU": 0.5, "accelerator_type:H100": 0.001}
    assert (decoding.resources, io.resources) == ({"CPU": 0.5}, {"CPU": 0.25})
    encoder, *_ = wanted_workers(Resources(encoder_cpus=2), execution=ON_CPUS)
    assert (encoder.what, encoder.kind) == ("an encoder", "actor")
    assert encoder.resources == {"CPU": 2}


@pytest.mark.parametrize(
    ("io_cpus", "demands"),
    [
        (
            0.25,
            [
                ("an encoder or decoding", {"CPU": 0.5}, "--encoder-cpus or --decode-cpus"),
                ("reading or writing", {"CPU": 0.25}, None),
            ],
        ),
        (
            0.5,
            [
                (
                    "an encoder or decoding or reading or writing",
                    {"CPU": 0.5},
                    "--encoder-cpus or --decode-cpus",
                )
            ],
        ),
    ],
)
def test_what_waits_for_the_same_is_not_taken_for_an_encoder(io_cpus: float, demands: list):
    wanted = wanted_workers(Resources(io_cpus=io_cpus), execution=ON_CPUS)
    assert [(demand.what, demand.resources, demand.option) for demand in wanted] == demands
    # A queued decode task may wait while others move: that is no encoder without a place.
    assert {demand.kind for demand in wanted} == {"task"}


def test_fewer_at_most_than_at_least_is_a_fault():
    with pytest.raises(ValueError, match=re.escape("max_encoders=2: expected at least num_en")):
        Resources(num_encoders=3, placement=Placement(max_encoders=2))


def test_what_is_in_flight_grows_with_a_cluster_that_grows(cluster):
    context = DataContext.get_current()
    cluster({"CPU": 16.0}, grows=False)
    with ray_data_settings(modalities=["image"]):
        limits = context.execution_options.resource_limits
        assert limits.object_store_memory == 16 * IN_FLIGHT_BYTES_PER_CPU
        assert PlacementCallback in context.execution_callback_classes
    cluster({"CPU": 0.0}, grows=True)
    with ray_data_settings(modalities=["image"]):
        limits = context.execution_options.resource_limits
        assert limits.object_store_memory == float("inf")
    assert PlacementCallback not in context.execution_callback_classes


def test_options_say_what_workers_take():
    parser = CommandParser("embed", description="")
    add_embed_options(parser)
    needed = ["--catalog", "a", "--store", "b", "--checkpoint", "c"]
    config = embed_config_from(parser.parse_options(needed), command=())
    assert config.resources == Resources()
    given = ["--num-encoders", "2", "--max-encoders", "6", "--accelerator-type", "L4"]
    given += ["--placement-warning", "5", "--placement-timeout", "50", "--encoder-gpus", "0.5"]
    config = embed_config_from(parser.parse_options([*needed, *given]), command=())
    assert config.resources == Resources(
        num_encoders=2,
        encoder_gpus=0.5,
        placement=Placement(max_encoders=6, accelerator_type="L4", warn_seconds=5, fail_seconds=50),
    )
