"""A daemon whose Kubernetes node is cordoned drains, with the real client against answers of the real shape."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from backstay.testing.wait import wait_until
from tests.kit.kubernetes_api import KubernetesApi
from tests.kit.node import running_node

kubernetes_node = pytest.importorskip(
    "backstayd.kubernetes_cordon", reason="the package kubernetes is not installed: pip install 'backstay[kubernetes]'"
)
NAME = "gpu-17"


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    with KubernetesApi() as server:
        path = tmp_path / "kubeconfig"
        path.write_text(server.kubeconfig())
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        monkeypatch.setattr(kubernetes_node, "POLL_S", 0.1)
        yield server


def test_a_node_drains_while_its_kubernetes_node_is_cordoned(api: KubernetesApi, tmpfs_dir: Path) -> None:
    api.unschedulable[NAME] = False
    with running_node(tmpfs_dir, kubernetes_node=NAME) as node:
        drain = node.node.state.drain
        wait_until(lambda: len(api.asked) > 2, deadline_s=10, why="the API server to be asked")
        assert not drain.is_draining
        api.unschedulable[NAME] = True
        wait_until(lambda: drain.is_draining, deadline_s=10, why="the node to drain")
        assert drain.is_cordoned
        assert (tmpfs_dir / "n1-memory" / ".draining.json").exists()
    with running_node(tmpfs_dir, kubernetes_node=NAME) as node:
        assert node.node.state.drain.is_draining, "the next daemon drains before it asked anybody"
    api.unschedulable[NAME] = False
    with running_node(tmpfs_dir, kubernetes_node=NAME) as node:
        drain = node.node.state.drain
        wait_until(lambda: not drain.is_draining, deadline_s=10, why="the node to be used again")
        assert set(api.asked) == {f"/api/v1/nodes/{NAME}"}
        assert not (tmpfs_dir / "n1-memory" / ".draining.json").exists()


def test_a_cordon_is_forgotten_where_nobody_looks_at_kubernetes_any_more(tmpfs_dir: Path) -> None:
    memory = tmpfs_dir / "n1-memory"
    memory.mkdir(mode=0o700)
    (memory / ".draining.json").write_text('{"by_cordon":true,"by_operator":true}')
    with running_node(tmpfs_dir) as node:
        assert not node.node.state.drain.is_cordoned
        assert node.node.state.drain.is_draining, "the operator's order stands"


def test_while_the_api_server_refuses_what_was_heard_last_holds_and_the_missing_right_is_named(
    api: KubernetesApi, caplog: pytest.LogCaptureFixture
) -> None:
    api.unschedulable[NAME] = True
    heard: list[bool] = []
    watch = kubernetes_node.CordonWatch(NAME, on_answer=heard.append, poll_s=0.05)
    with caplog.at_level(logging.INFO):
        watch.start()
        try:
            wait_until(lambda: heard, deadline_s=10, why="the first answer")
            api.is_forbidden = True
            asked, count = len(api.asked), len(heard)
            wait_until(lambda: len(api.asked) > asked + 5, deadline_s=10, why="more questions")
            assert len(heard) <= count + 1
            api.is_forbidden = False
            wait_until(lambda: len(heard) > count + 1, deadline_s=10, why="answers again")
        finally:
            watch.close()
    assert set(heard) == {True}
    texts = [record.getMessage() for record in caplog.records if NAME in record.getMessage()]
    assert len(texts) == 2, "each change is said once"
    assert "403 Forbidden: a ClusterRole must allow get on nodes" in texts[0]
    assert "answers again" in texts[1]


def test_a_node_that_kubernetes_does_not_know_is_said_with_the_setting(
    api: KubernetesApi, caplog: pytest.LogCaptureFixture
) -> None:
    watch = kubernetes_node.CordonWatch("nobody", on_answer=lambda _: None, poll_s=0.05)
    watch.start()
    try:
        wait_until(lambda: len(api.asked) > 2, deadline_s=10, why="the API server to be asked")
    finally:
        watch.close()
    assert "no such Node; set [node] kubernetes_node" in caplog.text
