"""Settings that every test runs under, whatever machine and shell it is started on."""

import os
import signal

import hypothesis
import pytest

# Results are held to the bit against those of other processes, so all have one thread.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The servers of tests listen on this machine: no proxy leads there.
os.environ["no_proxy"] = "*"
# Nor does a launcher, or what a user has set for runs of their own, count here.
_LAUNCHERS = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "MPI_LOCAL", "MASTER_", "TORCHELASTIC_")
_PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
for _name in list(os.environ):
    if _name in _PLACES or _name.startswith((*_LAUNCHERS, "OPENAI_LOG", "ES_DDPM_")):
        del os.environ[_name]

# Jobs in the background of a shell ignore these, and so would every process that a test starts and
# means to stop with them. A handler that does nothing is not handed on.
for _signum in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        signal.signal(_signum, lambda *_: None)

# The same examples everywhere, so that a run fails by a change and not by chance. To look for new
# ones: pytest --hypothesis-profile default.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("same")


@pytest.fixture(autouse=True)
def same_numbers():
    """Numbers that a test draws without a seed do not depend on the tests before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Tiny networks and images, and tiny.toml that names them: `tiny_sampling.TinyFiles`."""
    from tests.tiny_sampling import TinyFiles

    files = TinyFiles(tmp_path_factory.mktemp("tiny"))
    files.preset()
    return files
