"""What is done on a Ray cluster of others, without one: nothing of theirs is replaced or ended."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from engine.errors import ClipmillError
from jobs.serving import deployment


@dataclass
class Cluster:
    """Ray Serve as the deployment sees it, on one cluster."""

    apps: set[str] = field(default_factory=set)
    is_running: bool = True
    was_shut_down: bool = False

    def status(self) -> SimpleNamespace:
        return SimpleNamespace(applications=dict.fromkeys(self.apps))

    def delete(self, name: str) -> None:
        self.apps.remove(name)

    def shutdown(self) -> None:
        self.was_shut_down = True

    def client(self, *, raise_if_no_controller_running: bool) -> SimpleNamespace | None:
        config = SimpleNamespace(host="10.0.0.7", port=8000)
        return SimpleNamespace(http_config=config) if self.is_running else None


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    monkeypatch.setattr(deployment, "serve", found)
    monkeypatch.setattr(deployment, "_get_global_client", found.client)
    return found


def test_on_a_cluster_of_others_the_own_app_alone_is_ended(cluster: Cluster):
    cluster.apps = {"theirs", deployment.APP_NAME}
    deployment.take_down(is_own_cluster=False)
    assert cluster.apps == {"theirs"}
    assert not cluster.was_shut_down
    cluster.is_running = False
    deployment.take_down(is_own_cluster=False)  # it was never started


def test_a_ray_of_our_own_ends_as_a_whole(cluster: Cluster):
    deployment.take_down(is_own_cluster=True)
    assert cluster.was_shut_down


def test_an_app_that_runs_already_is_not_replaced(cluster: Cluster):
    cluster.apps = {deployment.APP_NAME}
    with pytest.raises(ClipmillError, match="name another --address"):
        deployment.check_place(host="10.0.0.7", port=8000)


def test_what_ray_serve_does_not_listen_to_is_refused(cluster: Cluster):
    cluster.apps = {"theirs"}
    deployment.check_place(host="10.0.0.7", port=8000)
    with pytest.raises(ClipmillError, match=r"already, at 10\.0\.0\.7:8000"):
        deployment.check_place(host="127.0.0.1", port=8000)
    cluster.is_running = False
    deployment.check_place(host="127.0.0.1", port=8000)
