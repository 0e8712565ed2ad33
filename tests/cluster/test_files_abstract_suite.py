"""fsspec's own suite for file systems, in a folder with a number and in one without, against a real daemon."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import fsspec
import pytest
from fsspec.tests import abstract

import backstay.files
from backstay.testing import LocalCluster

_numbers = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(1, 0, lease_s=1.0) as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("BACKSTAY_SOCKET", str(running.nodes[0].socket))
        yield running
        for kind in (TestInAFolderWithANumber, TestInAFolderWithoutANumber):
            backstay.files.finish(f"backstay://suite/{kind.__name__}")


class Fixtures(abstract.AbstractFixtures):
    folder = ""

    @pytest.fixture
    def fs(self) -> fsspec.AbstractFileSystem:
        return fsspec.filesystem("backstay", skip_instance_cache=True)

    @pytest.fixture
    def fs_path(self) -> str:
        return f"suite/{type(self).__name__}/{self.folder}/{next(_numbers)}th"


class Suite(
    abstract.AbstractCopyTests,
    abstract.AbstractGetTests,
    abstract.AbstractOpenTests,
    abstract.AbstractPipeTests,
    abstract.AbstractPutTests,
    Fixtures,
):
    """Everything that fsspec asks of a file system."""


class TestInAFolderWithANumber(Suite):
    folder = "step-100"


class TestInAFolderWithoutANumber(Suite):
    folder = "final"
