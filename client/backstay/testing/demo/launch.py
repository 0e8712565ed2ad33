"""Starts the training run under torchrun: a rendezvous store of its own and one agent per node. Injects no faults."""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Final

from backstay.testing.demo.scenario import Scenario
from backstay.testing.ports import free_port

_HERE: Final = Path(__file__).parent
_TEXT_LIMIT_BYTES: Final = 4 * 1024 * 1024
_FIRST_ADDRESS: Final = (
    11  # 127.0.0.11 and up: torchrun orders ranks by address as text, so the digits must be equal in number
)
HEAD_WIDTH: Final = 32
_RENDEZVOUS: Final = (
    "is_host=0,join_timeout=300,close_timeout=10,read_timeout=60,"
    "keep_alive_interval=1,keep_alive_max_attempt=4"  # a dead agent is dropped after 4 s
)
_LAST_CALL_S: Final = 12  # wait for further agents once the minimum has joined, if the world may shrink
PRELOADED_FOR_BACKSTAY: Final = "backstay,backstay.snapshotter"

Spawn = Callable[[int, Sequence[str], Mapping[str, str], str], Popen[bytes]]
SpawnBeside = Callable[[Sequence[str], Mapping[str, str], str], Popen[bytes]]


def write_text(path: Path) -> int:
    """Write Python's own standard library sources to ``path``, in the order of names; returns the bytes written."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(source.read_bytes() for source in sources)[:_TEXT_LIMIT_BYTES]
    path.write_bytes(text)
    return len(text)


@dataclass(slots=True, kw_only=True)
class TorchRun:
    """One training run: its notes, its rendezvous store, and its agents by node."""

    scenario: Scenario
    directory: Path
    text: Path
    run_id: str  # "" = control
    spawn: Spawn
    spawn_beside: SpawnBeside
    port: int = field(default_factory=free_port)
    agents: dict[int, Popen[bytes]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "protected" if self.run_id else "control"

    @property
    def notes_dir(self) -> Path:
        return self.directory / f"notes-{self.name}"

    @property
    def gate_file(self) -> Path:
        """Contains the last step that trainers may compute for now."""
        return self.directory / "gate"

    def permit(self, step: int) -> None:
        """Let trainers proceed up to ``step``; never lowers the limit."""
        if not self.gate_file.exists() or int(self.gate_file.read_text()) < step:
            new = self.gate_file.with_suffix(".new")
            new.write_text(str(step))
            new.rename(self.gate_file)

    def start(self) -> None:
        self.notes_dir.mkdir(parents=True)
        argv = [sys.executable, "-P", str(_HERE / "torchrun.py"), "store", "127.0.0.1", str(self.port)]
        self.spawn_beside(argv, self._environment(), f"store-{self.name}")
        for node in range(self.scenario.nodes):
            self.start_agent(node)

    def start_agent(self, node: int) -> None:
        """Start the agent of ``node``, also as the replacement of a destroyed one; it joins the rendezvous."""
        argv = [
            *(sys.executable, "-P", str(_HERE / "torchrun.py")),
            *(f"--nnodes={self._node_counts()}", f"--nproc-per-node={self.scenario.ranks_per_node}"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.port}", f"--rdzv-id=demo-{self.name}"),
            f"--rdzv-conf={_RENDEZVOUS},last_call_timeout={_LAST_CALL_S if self.scenario.shrink else 1}",
            *("--max-restarts=100", "--monitor-interval=0.1", "--start-method=fork"),
            *(f"--local-addr=127.0.0.{_FIRST_ADDRESS + node}", "--run-path", str(_HERE / "train.py")),
        ]
        self.agents[node] = self.spawn(node, argv, self._environment(), f"agent-{self.name}-{node}")

    def _node_counts(self) -> str:
        scenario = self.scenario
        return f"{scenario.last_nodes}:{scenario.nodes}" if scenario.shrink else str(scenario.nodes)

    def _environment(self) -> dict[str, str]:
        scenario = self.scenario
        settings = {
            "steps": scenario.steps,
            "d_model": scenario.d_model,
            "layers": scenario.layers,
            "heads": scenario.d_model // HEAD_WIDTH,
            "tokens": scenario.tokens,
            "batch": scenario.batch * (scenario.world_size if scenario.shrink else 1),
            "text": str(self.text),
            "notes_dir": str(self.notes_dir),
            "run_id": self.run_id,
            "may_shrink": scenario.shrink,
            "gate_file": str(self.gate_file) if self.run_id else "",
        }
        return {
            "DEMO_SETTINGS": json.dumps(settings),
            "DEMO_PRELOAD": PRELOADED_FOR_BACKSTAY if self.run_id else "",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
