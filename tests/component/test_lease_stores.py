"""The places a lease record is kept in, through their real clients: a real etcd, and Lease objects over real HTTP.

One contract for both; then what only one of them can do wrong. And the election's driver over each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from backstay.errors import ConfigError, UnavailableError
from backstayd.clock import boot_s
from backstayd.election.driver import Election
from backstayd.election.elector import Elector
from backstayd.election.lease import LeaseRecord, LeaseStore, Timing
from backstayd.election.stores import open_store, parse
from tests.kit.cut_proxy import CutProxy
from tests.kit.etcd import Etcd, needs_etcd, running_etcd
from tests.kit.kubernetes_api import KubernetesApi
from tests.kit.wording import refuses

ENGINES = [pytest.param("etcd", marks=needs_etcd), "kubernetes"]
ONE = LeaseRecord(holder="c-1", address="10.0.0.1:7070", term=1, lease_s=9.0)
TWO = LeaseRecord(holder="c-2", address="[fd00::2]:7070", term=2, lease_s=9.0)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with running_etcd(tmp_path_factory.mktemp("etcd")) as running:
        yield running


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    with KubernetesApi() as server:
        path = tmp_path / "kubeconfig"
        path.write_text(server.kubeconfig())
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        monkeypatch.setenv("KUBECONFIG", str(path))
        yield server


@contextmanager
def opened(url: str, call_timeout_s: float = 3.0) -> Iterator[LeaseStore]:
    store = open_store(url, call_timeout_s=call_timeout_s)
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def urls(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """By engine and test: a place nobody else uses."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)[:60].strip("-").lower()

    def make(engine: str) -> str:
        if engine == "etcd":
            running: Etcd = request.getfixturevalue("etcd")
            return running.url(name)
        request.getfixturevalue("kubernetes")
        return f"kubernetes://backstay/{name}"

    return make


@pytest.mark.parametrize("engine", ENGINES)
def test_a_record_is_written_only_over_the_version_that_was_read(engine: str, urls: Callable[[str], str]) -> None:
    with opened(urls(engine)) as store, opened(urls(engine)) as other:
        assert store.read() is None
        first = store.compare_and_swap(ONE, None)
        assert first is not None
        assert other.compare_and_swap(TWO, None) is None, "there is one by now"
        seen = other.read()
        assert seen is not None
        assert (seen.record, seen.version) == (ONE, first)
        second = other.compare_and_swap(TWO, seen.version)
        assert second not in (None, first)
        assert store.compare_and_swap(ONE, first) is None, "the version is out of date"
        again = store.compare_and_swap(TWO, second)
        assert again not in (None, second), "the same record written again is a new version: a renewal is seen"
        given_back = LeaseRecord(holder="", address="", term=2, lease_s=9.0)
        assert other.compare_and_swap(given_back, again) is not None
        found = store.read()
        assert found is not None
        assert found.record == given_back


def elect(url: str, name: str, timing: Timing, told: list[str]) -> Election:
    store = open_store(url, call_timeout_s=timing.call_timeout_s)
    return Election(
        store,
        Elector(name, f"{name}:7070", timing),
        timing,
        on_lead=lambda term: told.append(f"{name} leads {term}"),
        on_step_down=lambda reason: told.append(f"{name} ends: {reason}"),
        clock=boot_s,
    )


async def until(condition: Callable[[], object], why: str, deadline_s: float = 20.0) -> None:
    end = asyncio.get_running_loop().time() + deadline_s
    while not condition():
        assert asyncio.get_running_loop().time() < end, f"still not after {deadline_s} s: {why}"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_leads_and_hands_over_when_it_ends(engine: str, urls: Callable[[str], str]) -> None:
    async def scenario() -> None:
        told: list[str] = []
        timing = Timing(lease_s=2.0)
        first, second = (elect(urls(engine), name, timing, told) for name in ("c-1", "c-2"))
        await first.start()
        await until(first.may_act, "the first to lead")
        await second.start()
        await until(lambda: (leader := second.leader()) and leader.address == "c-1:7070", "the second to know whom")
        assert not second.may_act()
        assert 0 < first.margin_s() <= timing.renew_deadline_s
        await first.close()
        assert not first.may_act()
        await until(second.may_act, "the second to take over at once")
        assert told == ["c-1 leads 1", "c-1 ends: this coordinator is stopping", "c-2 leads 2"]
        await second.close()

    asyncio.run(scenario())


@needs_etcd
def test_a_leader_whose_line_to_etcd_is_cut_ends_before_another_begins(etcd: Etcd) -> None:
    async def scenario() -> None:
        told: list[str] = []
        timing = Timing(lease_s=1.5)
        with CutProxy(etcd.address) as proxy:
            first = elect(f"etcd://{proxy.address}/cut", "c-1", timing, told)
            second = elect(etcd.url("cut"), "c-2", timing, told)
            await first.start()
            await until(first.may_act, "the first to lead")
            await second.start()
            proxy.cut()
            await until(lambda: len(told) == 3, "the second to lead")
            assert told[1].startswith("c-1 ends: the lease was not renewed within 1 s")
            assert told[2] == "c-2 leads 2"
            proxy.mend()
            await until(lambda: (leader := first.leader()) and leader.holder == "c-2", "the first to see who leads")
            await first.close()
            await second.close()

    asyncio.run(scenario())


@needs_etcd
def test_a_member_of_etcd_that_is_away_is_passed_over(etcd: Etcd) -> None:
    with opened(f"etcd://127.0.0.1:1,{etcd.address}/members") as store:
        version = store.compare_and_swap(ONE, None)
        found = store.read()
        assert found is not None
        assert found.version == version


def test_an_etcd_that_is_away_is_said_with_every_member() -> None:
    pytest.importorskip("etcd3gw")
    with (
        opened("etcd://127.0.0.1:1,127.0.0.1:2/x") as store,
        pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1.*127\.0\.0\.1:2"),
    ):
        store.read()


@needs_etcd
def test_etcd_over_tls_wants_our_certificate_and_we_want_its(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ETCDCTL_CACERT", "ETCDCTL_CERT", "ETCDCTL_KEY"):
        monkeypatch.delenv(variable, raising=False)
    with running_etcd(tmp_path, is_tls=True) as etcd:
        with opened(etcd.url("tls")) as store:
            assert store.compare_and_swap(ONE, None) is not None
            found = store.read()
            assert found is not None
            assert found.record == ONE
        files = etcd.files("client")
        bare = f"etcd://{etcd.address}/tls"
        with (
            opened(f"{bare}?ca={files['ca']}") as store,
            pytest.raises((ConfigError, UnavailableError), match=etcd.address),
        ):
            store.read()  # no certificate of ours: an alert, or a reset before it is read
        with (
            opened(f"{bare}?cert={files['cert']}&key={files['key']}") as store,
            pytest.raises(ConfigError, match="verify"),
        ):
            store.read()  # an authority that nobody named
        with opened(bare) as store, pytest.raises((ConfigError, UnavailableError), match=etcd.address):
            store.read()  # no TLS at all
        with refuses(ConfigError, "bad_etcd_tls"), opened(f"{bare}?cert={files['cert']}"):
            pass
        monkeypatch.setenv("ETCDCTL_CACERT", files["ca"])
        monkeypatch.setenv("ETCDCTL_CERT", files["cert"])
        monkeypatch.setenv("ETCDCTL_KEY", files["key"])
        with opened(bare) as store:
            assert store.read() is not None


@needs_etcd
def test_a_key_that_is_not_ours_is_an_operators_error(etcd: Etcd) -> None:
    with opened(etcd.url("foreign")) as store:
        client = store._clients[0]  # type: ignore[attr-defined]
        client.put("/foreign/leader", "something else")
        with refuses(ConfigError, "foreign_lease"):
            store.read()


def test_what_kubernetes_refuses_is_an_operators_error_that_names_the_right(kubernetes: KubernetesApi) -> None:
    with opened("kubernetes://backstay/lead") as store:
        kubernetes.is_forbidden = True
        with refuses(ConfigError, "kubernetes_refused", 403):
            store.read()
        kubernetes.is_forbidden, kubernetes.is_failing = False, True
        with pytest.raises(UnavailableError, match="500"):
            store.compare_and_swap(ONE, None)


def test_another_writer_of_the_lease_costs_a_look_and_not_the_reign(kubernetes: KubernetesApi) -> None:
    async def scenario() -> None:
        told: list[str] = []
        election = elect("kubernetes://backstay/lead", "c-1", Timing(lease_s=2.0), told)
        await election.start()
        await until(election.may_act, "it to lead")
        for _ in range(5):
            before = kubernetes.leases["backstay", "lead"]["metadata"]["resourceVersion"]
            kubernetes.touch("backstay", "lead")
            await until(
                lambda before=before: (
                    int(kubernetes.leases["backstay", "lead"]["metadata"]["resourceVersion"]) > int(before) + 7
                ),
                "it to renew over that",
            )
        assert told == ["c-1 leads 1"]
        spec = kubernetes.leases["backstay", "lead"]["spec"]
        assert spec["holderIdentity"] == "c-1:7070_c-1"
        assert spec["leaseTransitions"] == 1
        await election.close()

    asyncio.run(scenario())


def test_without_access_to_kubernetes_it_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with (
        refuses(ConfigError, "no_kubernetes"),
        ExitStack() as s,
    ):
        s.enter_context(opened("kubernetes://backstay/lead"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("zookeeper://a:1/x", "is neither empty nor etcd://"),
        ("etcd://a:1", "has no PREFIX"),
        ("etcd://a/x", "is not HOST:PORT"),
        ("etcd://a:1/x?tls=yes", "has an unknown option tls"),
        ("kubernetes://Backstay/lead", "names that Kubernetes allows"),
        ("kubernetes://backstay", "names that Kubernetes allows"),
    ],
)
def test_a_url_that_names_no_place_is_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(url)
