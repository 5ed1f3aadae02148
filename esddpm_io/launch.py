"""Who started this process beside others: torchrun, a real MPI (mpiexec), Slurm (srun), or none."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from esddpm_io.errors import UserError

# The variables that hold rank, size and local rank. MPI goes before Slurm because mpiexec inside a
# Slurm job starts its daemons with srun. Only srun sets SLURM_STEP_NUM_TASKS together with a local
# rank for us; a batch script's own process also has SLURM_PROCID and SLURM_NTASKS, though it is
# alone.
_LAYOUTS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpi (hydra)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


@dataclass(frozen=True)
class Launch:
    """This process's place among those that were started together."""

    launcher: str  # "alone", "torchrun", "mpi" or "slurm"
    rank: int
    world_size: int
    local_rank: int  # among the processes of this machine


ALONE = Launch("alone", 0, 1, 0)


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Read rank, size and local rank from the variables of whichever launcher started us.

    `UserError` for what is no number, or no place among so many.
    """
    for launcher, names in _LAYOUTS.items():
        if all(name in environ for name in names):
            for name in names:
                if not environ[name].isdecimal():
                    raise UserError(f"{name} is {environ[name]!r}: {launcher} sets it to a number")
            rank, size, local_rank = (int(environ[name]) for name in names)
            if rank >= size:
                raise UserError(f"{names[0]} is {rank}, and {names[1]} {size}: it must be smaller")
            if launcher == "slurm" and size == 1:
                break  # an interactive shell under srun: what is started in it is alone
            return Launch(launcher.split()[0], rank, size, local_rank)
    return ALONE


def without_launch() -> dict[str, str]:
    """The environment for a child that is to work alone, though a launcher started us."""
    names = {name for layout in _LAYOUTS.values() for name in layout}
    return {name: value for name, value in os.environ.items() if name not in names}
