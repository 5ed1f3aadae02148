"""A child that is to work alone does not take itself for one of a launcher's processes."""

import json
import sys

import pytest

from esddpm_io.errors import UserError
from esddpm_io.launch import ALONE, find_launch, without_launch
from esddpm_io.processes import run_to_end

PLACES = {
    "torchrun": {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
    "mpi": {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"},
    "slurm": {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"},
}


@pytest.mark.parametrize("launcher", PLACES)
def test_a_child_is_alone(launcher, tmp_path, monkeypatch):
    for name, value in PLACES[launcher].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KEPT", "yes")
    assert find_launch().launcher == launcher
    write = f"import json, os; json.dump(dict(os.environ), open({str(tmp_path / 'env')!r}, 'w'))"
    assert run_to_end([sys.executable, "-c", write], without_launch()) == 0
    environ = json.loads((tmp_path / "env").read_text())
    assert find_launch(environ) == ALONE and environ["KEPT"] == "yes"


@pytest.mark.parametrize("launcher", PLACES)
def test_a_place_that_is_no_number_is_named(launcher):
    for name in PLACES[launcher]:
        with pytest.raises(UserError, match=f"^{name} is 'a': .* sets it to a number"):
            find_launch({**PLACES[launcher], name: "a"})
    rank, size, _ = PLACES[launcher]
    with pytest.raises(UserError, match=f"^{rank} is 1, and {size} 1: it must be smaller"):
        find_launch({**PLACES[launcher], size: "1"})
