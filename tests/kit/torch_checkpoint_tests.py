"""Run PyTorch's own checkpoint tests on the CPU with backstay in place of its file writers, and print what differs.

``python -m tests.kit.torch_checkpoint_tests DIRECTORY [PYTEST ARGUMENTS]``, DIRECTORY being ``test/distributed/checkpoint``
of a source tree of PyTorch: each test runs with PyTorch's files, through ``backstay.dcp`` and through ``backstay://``. Not part
of ``make test``: the tests are not ours, and are not in this project. docs/testing.md says which of them differ.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint
import torch.multiprocessing
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.testing._internal import common_distributed

import backstay.dcp
import backstay.files
from backstay.testing import LocalCluster

STORAGES = ("torch", "dcp", "files")
STORAGE = "TORCH_TESTS_STORAGE"
RESULTS = "TORCH_TESTS_RESULTS"
JOB = "torch-tests"
DEADLINE_S = 60.0
_ERROR = re.compile(r"(E +)?[\w.]*(Error|Exception): ")
# What a test of GPUs says, and what it says for CPUs; in this order.
_ON_CPU = (
    (r"cpu:gloo,cuda:nccl|\bnccl\b", "gloo"),
    (r"/cuda:(\d+|\{.*?\})", "/cpu"),
    (r"\.cuda\([^()]*\)", ""),
    (r"torch\.cuda\.current_device\(\)", "torch.device('cpu')"),
    (r"\"cuda(:\d+)?\"", '"cpu"'),
    (r"f\"cuda:\{.*?\}\"", '"cpu"'),
    (r"@(requires_nccl|requires_accelerator_dist_backend)\(.*\)\n", "\n"),
)
_stores: dict[str, backstay.dcp.Store] = {}


def _run_id(path: Any) -> str:
    return hashlib.sha256(os.fsencode(os.fspath(path))).hexdigest()[:20]


def _begin(path: Any) -> backstay.dcp.Store:
    """Begin anew, which all ranks do: what was saved last is what is read."""
    run_id = _run_id(path)
    store = _stores.get(run_id) or backstay.dcp.Store(run_id=run_id, job=JOB, strict=True)
    _stores[run_id] = store
    store.begin(deadline_s=DEADLINE_S)
    return store


class _ByPath:
    """What PyTorch's writers and readers of files have in common: they are made with a path, and are not for URLs."""

    def __init__(self, path: Any, *_: Any, **__: Any) -> None:
        self._path = path

    def reset(self, checkpoint_id: Any = None) -> None:
        self._path = checkpoint_id or self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return "://" not in os.fspath(checkpoint_id)


class DcpWriter(_ByPath, backstay.dcp.BackstayWriter):
    """As FileSystemWriter is made and used: by a path, for any number of saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        store = _begin(self._path)
        step = (store.step or 0) + 1
        store.writer(step)
        backstay.dcp.BackstayWriter.__init__(self, store, step)

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        assert self.wait_complete(DEADLINE_S)


class DcpReader(_ByPath, backstay.dcp.BackstayReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        backstay.dcp.BackstayReader.__init__(self, _begin(self._path))
        return super().read_metadata(*args, **kwargs)


def _url(path: Any) -> str:
    text = os.fspath(path)
    return text if "://" in text else f"backstay://{JOB}/{_run_id(path)}/checkpoint"


class _ByUrl(_ByPath):
    def __init__(self, path: Any, *args: Any, **options: Any) -> None:
        super(_ByPath, self).__init__(_url(path), *args, **options)

    def reset(self, checkpoint_id: Any = None) -> None:
        super(_ByPath, self).reset(_url(checkpoint_id) if checkpoint_id else None)  # type: ignore[misc]


class FilesWriter(_ByUrl, FsspecWriter):  # type: ignore[misc]
    """Through ``backstay://``."""


class FilesReader(_ByUrl, FsspecReader):  # type: ignore[misc]
    """Through ``backstay://``."""


def _patch(storage: str) -> None:
    """Before any test module is imported; its processes are forked, so that they have it too."""
    common_distributed.skip_if_lt_x_gpu = lambda *_, **__: lambda test: test
    fork = torch.multiprocessing.get_context("fork").Process
    common_distributed.MultiProcessTestCase._spawn_processes = lambda case: case._start_processes(fork)
    if storage == "torch":
        return
    writer, reader = (DcpWriter, DcpReader) if storage == "dcp" else (FilesWriter, FilesReader)
    package = torch.distributed.checkpoint
    for found in [
        package.__name__,
        *(f"{package.__name__}.{each.name}" for each in pkgutil.iter_modules(package.__path__)),
    ]:
        module: Any = importlib.import_module(found)
        for name, replacement in (("FileSystemWriter", writer), ("FileSystemReader", reader)):
            if hasattr(module, name):
                setattr(module, name, replacement)


def pytest_configure(config: Any) -> None:
    if STORAGE in os.environ:
        _patch(os.environ[STORAGE])


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or not report.passed:
        told = (report.longreprtext + report.capstderr + report.capstdout + report.caplog).splitlines()
        errors = [line.strip()[:300] for line in told if _ERROR.match(line)]
        line = {"test": report.nodeid, "outcome": report.outcome, "errors": list(dict.fromkeys(errors))}
        with Path(os.environ[RESULTS]).open("a") as file:
            file.write(json.dumps(line) + "\n")


def on_cpu(source: Path, target: Path) -> Path:
    """A copy of the tests that asks for CPUs."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    for file in target.rglob("*.py"):
        text = file.read_text()
        for pattern, replacement in _ON_CPU:
            text = re.sub(pattern, replacement, text)
        file.write_text(text)
    return target


def run(directory: Path, storage: str, socket: str, results: Path, arguments: list[str]) -> dict[str, Any]:
    """Outcome and errors of each test, by its name."""
    environment = {
        **os.environ, STORAGE: storage, RESULTS: str(results), "BACKSTAY_SOCKET": socket, "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo", "DISTRIBUTED_TESTS_DEFAULT_TIMEOUT": "90", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.kit.torch_checkpoint_tests", "-p", "no:cacheprovider"]
    subprocess.run([*command, *(arguments or ["."])], cwd=directory, env=environment, check=False)
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return {line["test"]: line for line in lines}


def main(directory: str, arguments: list[str]) -> int:
    with LocalCluster(1, 0, lease_s=1.0) as cluster, tempfile.TemporaryDirectory() as scratch:
        socket, tests = str(cluster.nodes[0].socket), on_cpu(Path(directory), Path(scratch, "tests"))
        found = {storage: run(tests, storage, socket, Path(scratch, storage), arguments) for storage in STORAGES}
    passed = {
        storage: {test for test, line in found[storage].items() if line["outcome"] == "passed"} for storage in STORAGES
    }
    print(
        f"\nof {len(found['torch'])} tests:",
        ", ".join(f"{storage}: {len(passed[storage])} passed" for storage in STORAGES),
    )
    for storage in STORAGES[1:]:
        for test in sorted(passed["torch"] - passed[storage]):
            errors = found[storage].get(test, {}).get("errors", ["did not run"])
            print(f"\n{storage}: {test}\n    " + "\n    ".join(errors[:8]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
