"""A cluster for all tests of this folder."""

import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing, running_cluster


@pytest.fixture(scope="session")
def cluster():
    """A running Slurm; a skip where it is not installed."""
    if absent := missing():
        pytest.skip(f"{', '.join(absent)}: not installed (Debian: slurm-wlm and munge)")
    # A socket's path has at most 108 characters, which pytest's own folders use up.
    with (
        tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True) as folder,
        running_cluster(Path(folder)) as running,
    ):
        yield running


@pytest.fixture(autouse=True)
def stopped_jobs(cluster: Cluster):
    """What a failed test has left does not take the others' CPUs."""
    yield
    cluster.run("scancel", "--me")
