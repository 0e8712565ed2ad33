"""What an import costs and drags in: seen in a fresh interpreter, not read from the source."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_IMPORT = """
import importlib, json, sys
names = json.loads(sys.argv[1])
for name in names:
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def _modules(root: str) -> list[str]:
    """Every module below an import root, as dotted names; ``__main__`` modules would run and are left out."""
    base = ROOT / root
    names = []
    for path in sorted(base.rglob("*.py")):
        parts = path.relative_to(base).with_suffix("").parts
        if "__pycache__" not in parts and parts[-1] != "__main__":
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def _loaded_by(names: list[str]) -> set[str]:
    command = [sys.executable, "-c", _IMPORT, json.dumps(names)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_import_backstay_loads_neither_torch_nor_grpc_nor_protobuf() -> None:
    loaded = _loaded_by(["backstay"])
    assert not loaded & {"torch", "numpy", "grpc", "google", "backstayd", "pyeclib", "prometheus_client"}


def test_the_trainers_side_never_loads_grpc_or_protobuf_or_the_daemon() -> None:
    pytest.importorskip("torch")
    trainer_side = [name for name in _modules("client") if not name.startswith("backstay.testing")]
    loaded = _loaded_by(trainer_side)
    assert "torch" in loaded, "this test looks at the modules that use torch"
    assert not loaded & {"grpc", "backstayd", "pyeclib", "prometheus_client"}


def test_the_daemon_and_the_operators_command_never_load_torch() -> None:
    names = _modules("daemon")
    assert "backstayd.core.messages.report" in names
    loaded = _loaded_by(names)
    assert "grpc" in loaded, "this test looks at the modules that use grpc"
    assert not loaded & {"torch", "numpy", "safetensors"}


def test_every_name_of_the_facade_can_be_had() -> None:
    code = "import backstay; [getattr(backstay, name) for name in backstay.__all__]; print(backstay.__version__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_a_name_that_the_facade_does_not_have_is_an_attribute_error() -> None:
    import backstay

    with pytest.raises(AttributeError, match="no attribute 'Snapshoter'"):
        _ = backstay.Snapshoter  # type: ignore[attr-defined]
