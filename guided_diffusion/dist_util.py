"""Processes that train together: who started us, which device is ours, and how tensors travel.

The launcher is found from the environment: torchrun, a real MPI (mpiexec), Slurm (srun), or none.
MPI is imported only when MPI started us. Gradients and parameters travel by NCCL between CUDA
devices and by gloo between CPUs; a single process has a group of one, so that code which asks
`torch.distributed` for its rank works everywhere.
"""

import atexit
import gc
import importlib
import io
import os
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from esddpm_io.errors import UserError
from esddpm_io.launch import Launch, find_launch

T = TypeVar("T")

# gloo counts a message's bytes in a C int, so larger ones go in pieces.
_CHUNK_BYTES = 1 << 30
# Slurm gives no port: one of this range, by job and step number, so that two jobs on a node differ.
_SLURM_PORTS = (20000, 20000)

# guided-diffusion's settings, which other code imports; launchers tell us what they were for.
GPUS_PER_NODE = 8
SETUP_RETRY_COUNT = 3

_launch: "Launch | None" = None


def setup_dist() -> Launch:
    """Join the processes that were started with us; a second call changes nothing.

    On a machine with CUDA the process takes the device of its local rank. Raises `UserError` if
    the processes cannot find each other's address.
    """
    global _launch
    if _launch is not None:
        return _launch
    launch = find_launch()
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
    if not dist.is_initialized():
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()  # not on Windows
        backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
        place = {"rank": launch.rank, "world_size": launch.world_size}
        if launch.world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), **place)
        else:
            _set_address(launch)
            # DistributedDataParallel imports it; if a group exists by then, it is kept for ever.
            importlib.import_module("torch._dynamo")

            dist.init_process_group(backend, init_method="env://", **place)
        atexit.register(_end_group)
    _launch = launch
    return launch


def _end_group() -> None:
    """Join the threads of our process group while there still is an interpreter.

    They let go of the last message's tensors some time after it has arrived, and need Python's
    lock for it: a thread that asks for the lock of an interpreter that ends aborts the process.
    """
    global _launch
    _launch = None
    # An exception that nobody caught keeps its frames, and so a loop with the group, alive.
    sys.last_exc = sys.last_value = sys.last_traceback = None
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def _set_address(launch: Launch) -> None:
    """Put the address of rank 0 into the environment, where it is not there already."""
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return
    if launch.launcher == "mpi":
        address, port = _address_over_mpi()
    elif launch.launcher == "slurm":
        address, port = _address_from_slurm(os.environ)
    else:
        raise UserError("MASTER_ADDR and MASTER_PORT must be set beside RANK and WORLD_SIZE")
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", str(port))


def _address_over_mpi() -> tuple[str, int]:
    """Rank 0's host name and a free port of its, told to all by MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpiexec started us, but mpi4py cannot be used ({error}): pip install mpi4py mpich"
        ) from error
    world = MPI.COMM_WORLD
    # Where all share one machine its name need not resolve.
    one_machine = world.Split_type(MPI.COMM_TYPE_SHARED).size == world.size
    address = None
    if world.rank == 0:
        host = "127.0.0.1" if one_machine else socket.getfqdn()
        address = (host, _find_free_port())
    return world.bcast(address, root=0)


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _address_from_slurm(environ: Mapping[str, str]) -> tuple[str, int]:
    """The first node of the step, and a port that follows from job and step number."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "")
    if not nodes:
        raise UserError("srun set no SLURM_STEP_NODELIST: set MASTER_ADDR and MASTER_PORT yourself")
    job = int(environ.get("SLURM_JOB_ID", 0)) * 7 + int(environ.get("SLURM_STEP_ID", 0))
    first_port, ports = _SLURM_PORTS
    host = "127.0.0.1" if environ.get("SLURM_STEP_NUM_NODES") == "1" else first_slurm_node(nodes)
    return host, first_port + job % ports


def first_slurm_node(nodes: str) -> str:
    """The first host of a Slurm node list: "gpu[03-05,9]-x,login1" gives "gpu03-x"."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return nodes.split(",")[0]
    inside, _, tail = rest.partition("]")
    first = inside.split(",")[0].split("-")[0]
    return head + first + tail.split(",")[0]


def dev() -> torch.device:
    """The device of this process: the current CUDA device, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def rank() -> int:
    """This process's rank, 0 before `setup_dist`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 before `setup_dist`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_rank_zero(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 only; its (small, picklable) result, or `UserError`, is all ranks'.

    No rank waits for one that failed.
    """
    result, problem = None, None
    if rank() == 0:
        try:
            result = function()
        except UserError as error:
            problem = str(error)
    if world_size() > 1:
        answer = [result, problem]
        dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        result, problem = answer
    if problem is not None:
        raise UserError(problem)
    return result


def load_state_dict(
    path: str,
    *,
    flag: str = "checkpoint",
    map_location: torch.device | str = "cpu",
    weights_only: bool = True,
) -> Any:
    """What `torch.save` wrote to a file that only rank 0 needs to see; every rank gets it.

    Whatever `weights_only` says, which is there because code passes it to `torch.load`, no other
    file is read.

    Raises `UserError` on every rank as `checkpoints.load_object` does on one.
    """
    from .checkpoints import load_object

    serialised = io.BytesIO()

    def read() -> int:
        torch.save(load_object(path, flag=flag), serialised)
        return serialised.tell()

    size = on_rank_zero(read)
    if world_size() > 1:
        data = torch.empty(size, dtype=torch.uint8)
        if rank() == 0:
            data = torch.frombuffer(serialised.getbuffer(), dtype=torch.uint8)
        for piece in data.split(_CHUNK_BYTES):
            dist.broadcast(piece, src=0)
        if rank() != 0:
            serialised = io.BytesIO(data.numpy())
    serialised.seek(0)
    return torch.load(serialised, map_location=map_location, weights_only=True)


def sync_params(params: Iterable[torch.Tensor]) -> None:
    """Overwrite every rank's tensors with those of rank 0."""
    if world_size() == 1:
        return
    with torch.no_grad():
        for tensor in params:
            # NCCL and gloo want dense memory; a channels-last weight is not contiguous as it is.
            dense = tensor.detach().contiguous()
            dist.broadcast(dense, src=0)
            tensor.copy_(dense)


def gather_objects(obj: Any) -> list[Any]:
    """One small picklable object of every rank, on every rank, in rank order."""
    if world_size() == 1:
        return [obj]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


class AllRanks:
    """The one method of an mpi4py communicator that `logger` uses, over our own group.

    `logger.configure(comm=AllRanks())` makes figures means over all processes; all of them must
    call `dumpkvs` then.
    """

    def gather(self, obj: Any, root: int = 0) -> list[Any] | None:
        """`obj` of every rank in rank order on `root`, None elsewhere."""
        gathered = gather_objects(obj)
        return gathered if rank() == root else None


def any_rank(*flags: bool) -> list[bool]:
    """For each flag whether it is set on any rank; all ranks get one answer."""
    if world_size() == 1:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.uint8)  # on the CPU: a message that waits for no device
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return votes.bool().tolist()


def local_world_size() -> int:
    """How many of the processes run on this machine."""
    return gather_objects(socket.gethostname()).count(socket.gethostname())
