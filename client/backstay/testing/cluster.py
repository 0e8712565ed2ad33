"""A real cluster on one machine: a coordinator and node daemons as processes; each node can be destroyed with its memory.

Used by backstay's cluster tests, by the demo, and by a user's own fault-injection tests:

    with LocalCluster(nodes=3, parity=1) as cluster:
        trainer = cluster.run_on_node(0, [sys.executable, "train.py"])
        cluster.wait_until(lambda: cluster.run_status("default/mine")["protected_step"] >= 5, 60, "step 5 to be safe")
        cluster.destroy_node(1)
        cluster.replace_node(1)

Standard library and Linux only. Never imports backstayd but starts it, as an operator would.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from backstay.errors import ConfigError, UnavailableError, UsageError
from backstay.testing.certificates import PLAINTEXT, Certificates
from backstay.testing.daemons import COORDINATOR, DAEMON_ROLE, HOST, WORK_ROLE, LocalCoordinator, LocalNode, leading
from backstay.testing.guardian import guarded
from backstay.testing.ports import free_port
from backstay.testing.processes import ProcessKeeper, command_line, signal_processes
from backstay.testing.wait import wait_until

T = TypeVar("T")
_SOCKET_PATH_LIMIT: Final = 107  # sun_path without its NUL
_START_DEADLINE_S: Final = 90.0


class LocalCluster:
    """n nodes and a coordinator, every fault a test may inject, and their true state to compare with.

    Invariant: after :meth:`close` no process, socket or file of the cluster is left, whatever happened to the nodes; a
    guardian process ensures this even if this process is killed.

    Args:
        nodes: How many nodes. Named ``node-0`` and up; a replacement is ``node-0-r1`` unless named otherwise.
        parity: m of every group, or "auto".
        group_size: Target n = k + m of a group.
        root: A short directory path on tmpfs; None makes a private one under /dev/shm.
        lease_s: The lease, from which all timeouts of the daemons derive.
        env: Added to the environment of the coordinator and every daemon (``BACKSTAY_FAULTS``, ``BACKSTAYD_...``).
        coordinator_env: Added to the environment of the first coordinator at :meth:`start` only, not of a restarted one.
        domains: Failure domain of each node, e.g. ``["rack-1", "rack-1", "rack-2"]``.
        quota: Memory limit of each daemon, such as "256MiB"; "" sets none.
        keep: Protected snapshots kept per run.
        coders: Coder processes per daemon.
        coordinators: How many; with more than one, the first leads initially, and ``election`` is required.
        election: URL of the election's store, such as "etcd://127.0.0.1:2379/test".
        settings: Further settings of the coordinator by their names, such as ``{"persist_url": "file:///mnt/checkpoints"}``.
        tls: Use certificates issued by `backstay certs` (needs the package cryptography); else plaintext.
        keep_logs: A directory the logs are moved to at close; None deletes them.
    """

    def __init__(
        self,
        nodes: int = 6,
        parity: int | str = 2,
        group_size: int = 6,
        root: Path | str | None = None,
        *,
        lease_s: float = 3.0,
        env: Mapping[str, str] | None = None,
        coordinator_env: Mapping[str, str] | None = None,
        domains: Sequence[str] = (),
        quota: str = "",
        keep: int = 1,
        coders: int = 1,
        coordinators: int = 1,
        election: str = "",
        settings: Mapping[str, object] | None = None,
        tls: bool = False,
        keep_logs: Path | str | None = None,
    ) -> None:
        if nodes < 1:
            raise UsageError(f"a cluster of {nodes} nodes cannot be started; at least 1")
        if coordinators > 1 and not election:
            raise UsageError(f"{coordinators} coordinators need an election to agree who leads")
        if domains and len(domains) != nodes:
            raise UsageError(f"{len(domains)} domains were given for {nodes} nodes; give one for each node, or none")
        self.cluster_id = secrets.token_hex(4)
        self.root = Path(root) if root is not None else Path(f"/dev/shm/backstay-{os.getpid()}-{self.cluster_id}")
        self.lease_s = lease_s
        self._is_own_root = root is None
        self._parity, self._group_size, self._keep, self._coders, self._quota = parity, group_size, keep, coders, quota
        self._env = dict(env or {})
        self._coordinator_env = dict(coordinator_env or {})
        self._settings = {f"BACKSTAYD_COORDINATOR_{n.upper()}": str(value) for n, value in (settings or {}).items()}
        self.certificates = Certificates(self.root / "certificates") if tls else None
        self._keep_logs = Path(keep_logs) if keep_logs is not None else None
        self.keeper = ProcessKeeper(self.cluster_id, self.root / "logs")
        self.coordinators = [LocalCoordinator(index=index, election=election) for index in range(coordinators)]
        self._guard = ExitStack()
        self.nodes = [
            self._new_node(index, f"node-{index}", domains[index] if domains else "") for index in range(nodes)
        ]
        self._replacement_count = [0] * nodes

    def _new_node(self, index: int, name: str, domain: str) -> LocalNode:
        node = LocalNode(index=index, name=name, directory=self.root / name, http_port=free_port(), domain=domain)
        if len(str(node.socket)) > _SOCKET_PATH_LIMIT:
            raise ConfigError(f"socket path {node.socket} is over {_SOCKET_PATH_LIMIT} bytes; choose a shorter root")
        return node

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start everything and wait until the coordinator sees every node live; a failure leaves nothing behind."""
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=not self._is_own_root)
        self._guard.enter_context(guarded(self.cluster_id, self.root))
        if self.certificates is not None:
            self.certificates.make(*(node.name for node in self.nodes), has_others=True)
        self.start_coordinator(self._coordinator_env)
        if len(self.coordinators) > 1:
            self.wait_until(self.leader, deadline_s=_START_DEADLINE_S, why="the first coordinator to lead")
        for coordinator in self.coordinators[1:]:
            self.start_coordinator(index=coordinator.index)
        for node in self.nodes:
            self._start_daemon(node)
        self.wait_live()

    def close(self) -> None:
        """Kill all remaining processes, delete all files, and check that nothing is left. Idempotent."""
        self.keeper.kill()
        if self._keep_logs is not None and self.keeper.log_dir.is_dir():
            shutil.copytree(self.keeper.log_dir, self._keep_logs, dirs_exist_ok=True)
        for node in self.nodes:
            shutil.rmtree(node.directory, ignore_errors=True)
        shutil.rmtree(self.keeper.log_dir, ignore_errors=True)
        if self.certificates is not None:
            shutil.rmtree(self.certificates.directory, ignore_errors=True)
        if self._is_own_root:
            shutil.rmtree(self.root, ignore_errors=True)
        self._guard.close()
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        """Raise AssertionError naming every process and file of this cluster that still exists."""
        left = [f"process {pid}: {command_line(pid)}" for pid in self.keeper.pids()]
        for path in [self.root] if self._is_own_root else [node.directory for node in self.nodes]:
            if path.exists():
                left += [f"file {found}" for found in [path, *sorted(path.rglob("*"))[:20]]]
        if left:
            raise AssertionError(f"cluster {self.cluster_id} left {len(left)} things behind: " + "; ".join(left))

    # -- coordinator --------------------------------------------------------------------------------------------------

    @property
    def coordinator_address(self) -> str:
        """The addresses of all coordinators, separated by commas, as nodes and operators get them."""
        return ",".join(coordinator.address for coordinator in self.coordinators)

    @property
    def coordinator_http_port(self) -> int:
        """Port of the first coordinator's HTTP server on this machine."""
        return self.coordinators[0].http_port

    @property
    def coordinator_process(self) -> subprocess.Popen[bytes] | None:
        """The first coordinator's process as started last, for ``poll()``; None before the start."""
        return self.coordinators[0].process

    def leader(self) -> LocalCoordinator:
        """The coordinator that leads; raises UnavailableError while none does."""
        return leading(self.coordinators)

    def start_coordinator(self, env: Mapping[str, str | None] | None = None, *, index: int = 0) -> None:
        """Start a coordinator at its address of this cluster; ``env`` is added to its environment."""
        coordinator = self.coordinators[index]
        argv = _daemon_argv("coordinator", *coordinator.arguments(), "--parity", str(self._parity))
        argv += ["--group-size", str(self._group_size), "--keep", str(self._keep), "--lease-s", f"{self.lease_s:g}"]
        security = PLAINTEXT if self.certificates is None else self.certificates.of_coordinator()
        environment = self._daemon_environment({**security, **self._settings, **(env or {})})
        name = coordinator.name
        coordinator.process = self.keeper.spawn(argv, name=name, node=name, role=DAEMON_ROLE, env=environment)

    def kill_coordinator(self, index: int = 0) -> None:
        """SIGKILL a coordinator; returns when it is gone."""
        self.keeper.kill(node=self.coordinators[index].name)

    def stop_coordinator(self, index: int = 0, *, deadline_s: float = 30.0) -> int:
        """SIGTERM a coordinator and return its exit status."""
        process = self.coordinators[index].process
        if process is None:
            raise UsageError(f"{self.coordinators[index].name} was not started")
        process.terminate()
        return process.wait(deadline_s)

    def restart_coordinator(self, env: Mapping[str, str] | None = None, *, index: int = 0) -> None:
        """Kill a coordinator if it runs, start another at the same address and wait until it answers."""
        self.kill_coordinator(index)
        self.start_coordinator(env, index=index)
        coordinator = self.coordinators[index]
        self.wait_until(
            coordinator.status, deadline_s=_START_DEADLINE_S, why=f"the restarted {coordinator.name} to answer"
        )

    # -- nodes --------------------------------------------------------------------------------------------------------

    def kill_daemon(self, index: int) -> None:
        """SIGKILL the node's daemon and wait until its coders have died with it; the memory stays."""
        node = self.nodes[index]
        if node.daemon is not None and node.daemon.poll() is None:
            node.daemon.kill()
            node.daemon.wait()
        self.wait_until(
            lambda: not self.keeper.pids(node=node.name, role=DAEMON_ROLE),
            deadline_s=20,
            why=f"the coders of {node.name} to die with their daemon",
        )

    def stop_daemon(self, index: int, *, deadline_s: float = 30.0) -> int:
        """SIGTERM the node's daemon and return its exit status; the memory stays."""
        node = self.nodes[index]
        if node.daemon is None:
            raise UsageError(f"{node.name} has no daemon to stop")
        node.daemon.terminate()
        try:
            status = node.daemon.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise UnavailableError(
                f"the daemon of {node.name} did not end within {deadline_s:g} s of SIGTERM"
            ) from None
        self.kill_daemon(index)
        return status

    def restart_daemon(
        self, index: int, env: Mapping[str, str | None] | None = None, *, is_waiting: bool = True
    ) -> None:
        """Kill the daemon if it runs and start another on the same memory; by default wait for its answer.

        ``env`` is added to its environment; None removes a variable.
        """
        node = self.nodes[index]
        if node.is_destroyed:
            raise UsageError(f"{node.name} was destroyed; use replace_node({index})")
        self.kill_daemon(index)
        self._start_daemon(node, env)
        if is_waiting:
            self.wait_until(
                node.status, deadline_s=_START_DEADLINE_S, why=f"the restarted daemon of {node.name} to answer"
            )

    def destroy_node(self, index: int) -> list[int]:
        """Lose the machine: SIGKILL every process of the node, in any session, and delete its memory.

        Returns the pids killed.
        """
        return self.destroy_nodes([index])

    def destroy_nodes(self, indexes: Sequence[int]) -> list[int]:
        """Destroy several nodes at once: all their processes are dead before the first directory is deleted."""
        killed: list[int] = []
        for index in indexes:
            signal_processes(self.keeper.pids(node=self.nodes[index].name), signal.SIGKILL)
        for index in indexes:
            killed += self.keeper.kill(node=self.nodes[index].name)
            self.nodes[index].is_destroyed = True
        for index in indexes:
            shutil.rmtree(self.nodes[index].directory)
        return killed

    def replace_node(self, index: int, name: str | None = None, *, is_waiting: bool = True) -> LocalNode:
        """Replace a destroyed node with an empty one, with a new name unless given, and start its daemon."""
        old = self.nodes[index]
        if not old.is_destroyed:
            raise UsageError(f"{old.name} still exists; destroy_node({index}) first", reason="node_exists")
        self._replacement_count[index] += 1
        node = self._new_node(index, name or f"node-{index}-r{self._replacement_count[index]}", old.domain)
        self.nodes[index] = node
        self._start_daemon(node)
        if is_waiting:
            self.wait_until(node.status, deadline_s=_START_DEADLINE_S, why=f"the daemon of {node.name} to answer")
        return node

    def freeze(self, part: int | str, *, is_whole_node: bool = False) -> list[int]:
        """SIGSTOP a node's daemon and coders (all its processes if ``is_whole_node``), or a coordinator by name."""
        return self._signal_part(part, signal.SIGSTOP, is_whole_node)

    def thaw(self, part: int | str, *, is_whole_node: bool = False) -> list[int]:
        """SIGCONT what :meth:`freeze` stopped; returns the pids."""
        return self._signal_part(part, signal.SIGCONT, is_whole_node)

    def _signal_part(self, part: int | str, number: signal.Signals, is_whole_node: bool) -> list[int]:
        if isinstance(part, str) and part not in [coordinator.name for coordinator in self.coordinators]:
            raise UsageError(
                f"cannot freeze or thaw {part!r}; name a node by its index, or {COORDINATOR!r}", reason="unknown_part"
            )
        name = part if isinstance(part, str) else self.nodes[part].name
        pids = self.keeper.pids(node=name, role=None if is_whole_node else DAEMON_ROLE)
        signal_processes(pids, number)
        return pids

    def _start_daemon(self, node: LocalNode, env: Mapping[str, str | None] | None = None) -> None:
        node.memory_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        argv = _daemon_argv("node", "--name", node.name, "--memory-dir", str(node.memory_dir))
        argv += ["--socket", str(node.socket), "--coordinator", self.coordinator_address, "--bulk", f"{HOST}:0"]
        argv += ["--http", f"{HOST}:{node.http_port}", "--coders", str(self._coders), "--lease-s", f"{self.lease_s:g}"]
        argv += ["--domain", node.domain] if node.domain else []
        argv += ["--quota", self._quota] if self._quota else []
        security = PLAINTEXT if self.certificates is None else self.certificates.of_node(node.name)
        environment = self._daemon_environment({**security, **(env or {})})
        node.daemon = self.keeper.spawn(argv, name=node.name, node=node.name, role=DAEMON_ROLE, env=environment)

    def _daemon_environment(self, env: Mapping[str, str | None] | None) -> dict[str, str]:
        wanted: dict[str, str | None] = {**process_environment(), **self._env, **(env or {})}
        return {name: value for name, value in wanted.items() if value is not None}

    @property
    def operator_environment(self) -> dict[str, str]:
        """Environment variables with which `backstay` reaches this cluster."""
        security = PLAINTEXT if self.certificates is None else self.certificates.of_operator()
        return process_environment() | security | {"BACKSTAY_COORDINATOR": self.coordinator_address}

    # -- trainers -----------------------------------------------------------------------------------------------------

    def run_on_node(
        self, index: int, argv: Sequence[str], env: Mapping[str, str] | None = None, *, name: str = ""
    ) -> subprocess.Popen[bytes]:
        """Start a trainer or agent that belongs to the node: it gets the node's socket and dies when the node is destroyed.

        Its output goes to ``<name>.log`` in the log directory.
        """
        node = self.nodes[index]
        environment = process_environment() | {"BACKSTAY_SOCKET": str(node.socket)} | dict(env or {})
        return self.keeper.spawn(
            argv, name=name or f"{node.name}-work", node=node.name, role=WORK_ROLE, env=environment
        )

    def run_beside(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, *, name: str
    ) -> subprocess.Popen[bytes]:
        """Start a process that belongs to the cluster but to no node, such as a rendezvous store."""
        return self.keeper.spawn(argv, name=name, role=WORK_ROLE, env=process_environment() | dict(env or {}))

    # -- true state ---------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The leading coordinator's status document; raises UnavailableError if there is no answer."""
        return self.leader().status()

    def run_status(self, run: str) -> dict[str, Any]:
        """The part of the coordinator's status about ``job/run_id``; raises UnavailableError while it is unknown."""
        for entry in self.status()["runs"]:
            if entry["run"] == run:
                return dict(entry)
        raise UnavailableError(f"the coordinator knows no run {run!r} yet")

    def node_status(self, index: int) -> dict[str, Any]:
        """The node daemon's own status document; raises UnavailableError when there is no answer."""
        return self.nodes[index].status()

    def files(self, index: int) -> dict[str, int]:
        """Every file in the node's memory, by listing it: path relative to its memory directory → bytes."""
        return self.nodes[index].files()

    def wait_until(self, condition: Callable[[], T], deadline_s: float, why: str) -> T:
        """Wait for ``condition``; a failure's message has the last status and the tails of all logs."""
        return wait_until(condition, deadline_s=deadline_s, why=why, evidence=self.evidence)

    def wait_live(self, *, deadline_s: float = _START_DEADLINE_S) -> None:
        """Wait until the coordinator sees the daemon that runs now on every node that was not destroyed as live."""

        def all_live() -> bool:
            self._check_running()
            seen = {entry["name"]: (entry["state"], entry["incarnation"]) for entry in self.status()["nodes"]}
            # a killed daemon counts as live for another lease: only the incarnation distinguishes it from its successor
            return all(
                seen.get(node.name) == ("live", node.status()["node"]["incarnation"])
                for node in self.nodes
                if not node.is_destroyed
            )

        self.wait_until(all_live, deadline_s, why="every node to be live at the coordinator")

    def _check_running(self) -> None:
        processes = [(coordinator.name, coordinator.process) for coordinator in self.coordinators]
        for name, process in [*processes, *((node.name, node.daemon) for node in self.nodes)]:
            if process is not None and process.poll() not in (None, -signal.SIGKILL):
                raise ConfigError(f"{name} ended unexpectedly with status {process.returncode}\n{self.evidence()}")

    def evidence(self) -> str:
        """The last status and the tails of all logs, for failure messages."""
        try:
            status = json.dumps(self.status())[-6000:]
        except UnavailableError as error:
            status = str(error)
        return f"--- status\n{status}\n{self.keeper.logs()}"


def process_environment() -> dict[str, str]:
    """This process's environment, with the import roots of backstay and backstayd on PYTHONPATH."""
    roots = []
    for package in ("backstay", "backstayd"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            roots.append(str(Path(spec.origin).parents[1]))
    paths = dict.fromkeys([*roots, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)}


def _daemon_argv(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "backstayd", *arguments]
