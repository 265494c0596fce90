"""One cluster for all tests of this folder: starting it takes seconds, and their jobs use it one after the other."""

import sys
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with Cluster(nodes=4) as running:
        running.environment |= {"FIPO_PYTHON": sys.executable, "FIPO_SITE": "/dev/null"}
        yield running
