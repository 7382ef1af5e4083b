"""What the stages may take, and that Ray Data's settings are put back."""

import pytest
import ray
from ray.data import DataContext

from pipelines.cluster.resources import Resources, num_workers
from pipelines.engines import Execution
from pipelines.progress import GPU_STAGES, STAGES
from pipelines.stages import IN_FLIGHT_BYTES_PER_CPU, ray_data_settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_encoders", 0),
        ("encoder_threads", 0),
        ("batch_rows", 0),
        ("rows_per_file", -1),
        ("encoder_cpus", 0.0),
        ("decode_cpus", -1.0),
        ("io_cpus", 0.0),
    ],
)
def test_resources_out_of_bounds_name_field_and_value(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name}={value}: expected"):
        Resources(**{name: value})


def test_workers_follow_the_cluster(local_ray: None):
    on_cpus = Execution(backend="onnxruntime", decoder="cpu")
    resources = Resources(io_cpus=0.5, decode_cpus=1, num_encoders=3)
    workers = num_workers(resources, execution=on_cpus)
    assert workers["encode"] == 3
    assert list(workers) == list(STAGES)
    assert workers["read"] == workers["write"] == 2 * workers["decode"]
    encoders = num_workers(Resources(), execution=on_cpus)["encode"]
    assert encoders == max(1, workers["decode"] // 2)


def test_where_gpus_decode_the_encoders_do_and_the_cpus_prepare(local_ray: None):
    on_gpus = Execution(backend="torch", decoder="gpu")
    workers = num_workers(Resources(num_encoders=3, decode_cpus=1), execution=on_gpus)
    assert list(workers) == list(GPU_STAGES)
    assert workers["decode"] == workers["encode"] == 3
    assert workers["read"] == workers["prepare"] == int(ray.cluster_resources()["CPU"])


def test_ray_data_settings_are_of_the_block_only(local_ray: None):
    context = DataContext.get_current()
    before = context.target_max_block_size, context.enable_progress_bars
    patience = context.execution_no_progress_timeout_s
    limits = context.execution_options.resource_limits
    with ray_data_settings(modalities=["text"]):
        assert not context.enable_progress_bars
        # Ray Data would end a run that waits for a place before --placement-timeout does.
        assert context.execution_no_progress_timeout_s == -1
        limit = context.execution_options.resource_limits.object_store_memory
        assert limit == IN_FLIGHT_BYTES_PER_CPU * int(ray.cluster_resources()["CPU"])
    assert (context.target_max_block_size, context.enable_progress_bars) == before
    assert context.execution_no_progress_timeout_s == patience > 0
    assert context.execution_options.resource_limits == limits
