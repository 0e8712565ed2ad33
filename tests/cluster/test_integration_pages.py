"""The programs on the pages about DCP and files do what the pages say: run twice, the second run goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from backstay.testing import LocalCluster
from backstay.testing.cluster import process_environment
from tests.kit.documented import write_example
from tests.kit.wording import says

CLUSTER = {"nodes": 1, "parity": 0, "lease_s": 1.0}


def _run(cluster: LocalCluster, script: Path, **env: str) -> str:
    environment = process_environment() | {"BACKSTAY_SOCKET": str(cluster.nodes[0].socket), **env}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_dcp_page_goes_on_from_the_last_step(cluster: LocalCluster, tmp_path: Path) -> None:
    script = write_example("integrations/dcp.md", "dcp_train.py", tmp_path)
    for steps, began in (("4", None), ("6", 4)):
        printed = _run(cluster, script, STEPS=steps)
        assert says("example_began", printed, step=began)
        assert says("example_complete", printed, is_complete=True)


def test_the_files_page_goes_on_from_the_last_folder(cluster: LocalCluster, tmp_path: Path) -> None:
    script = write_example("integrations/files.md", "files_train.py", tmp_path)
    assert says("example_began", _run(cluster, script, STEPS="2"), step=None)
    printed = _run(cluster, script, STEPS="3")
    assert says("example_notes", printed, step=2)
    assert says("example_began", printed, step=2)


def test_files_that_are_open_when_a_process_ends_well_are_kept(cluster: LocalCluster, tmp_path: Path) -> None:
    script = tmp_path / "leaves.py"
    script.write_text(
        "import fsspec, backstay.files\n"
        "url = 'backstay://default/leaves'\n"
        "print(backstay.files.begin(url))\n"
        "with fsspec.open(url + '/step-9/a', 'wb') as file: file.write(b'x')\n"
    )
    assert _run(cluster, script) == "None\n"
    script.write_text("import backstay.files\nprint(backstay.files.begin('backstay://default/leaves'))\n")
    assert _run(cluster, script) == "9\n"
