"""The programs on the pages about DCP and files do what the pages say: run twice, the second run goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from backstay.testing import LocalCluster
from backstay.testing.cluster import process_environment
from tests.kit.documented import write_example

CLUSTER = {"nodes": 1, "parity": 0, "lease_s": 1.0}


def _run(cluster: LocalCluster, script: Path, **env: str) -> list[str]:
    environment = process_environment() | {"BACKSTAY_SOCKET": str(cluster.nodes[0].socket), **env}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_dcp_page_goes_on_from_the_last_step(cluster: LocalCluster, tmp_path: Path) -> None:
    script = write_example("integrations/dcp.md", "dcp_train.py", tmp_path)
    assert _run(cluster, script, STEPS="4") == ["began from step None", "complete: True"]
    assert _run(cluster, script, STEPS="6") == ["began from step 4", "complete: True"]


def test_the_files_page_goes_on_from_the_last_folder(cluster: LocalCluster, tmp_path: Path) -> None:
    script = write_example("integrations/files.md", "files_train.py", tmp_path)
    assert _run(cluster, script, STEPS="2") == ["began from step None"]
    assert _run(cluster, script, STEPS="3") == ["notes of step 2", "began from step 2"]


def test_files_that_are_open_when_a_process_ends_well_are_kept(cluster: LocalCluster, tmp_path: Path) -> None:
    script = tmp_path / "leaves.py"
    script.write_text(
        "import fsspec, backstay.files\n"
        "url = 'backstay://default/leaves'\n"
        "print(backstay.files.begin(url))\n"
        "with fsspec.open(url + '/step-9/a', 'wb') as file: file.write(b'x')\n"
    )
    assert _run(cluster, script) == ["None"]
    script.write_text("import backstay.files\nprint(backstay.files.begin('backstay://default/leaves'))\n")
    assert _run(cluster, script) == ["9"]
