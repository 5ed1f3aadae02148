"""Figures and messages of a run: to stdout, `log.txt`, `progress.csv`, JSON, TensorBoard, wandb.

`configure` opens a folder (`OPENAI_LOGDIR`, or a dated temporary one) and the outputs named in
`OPENAI_LOG_FORMAT` (a comma list of stdout, log, csv, json, tensorboard, wandb; default
stdout,log,csv).
`logkv` and `logkv_mean` collect figures, `dumpkvs` writes them as one row, `log` writes a message.
With several processes only rank 0 writes figures; the others keep a `log-rankNNN.txt`
(`OPENAI_LOG_FORMAT_MPI`, default log).
"""

import contextlib
import csv
import datetime
import json
import os
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from esddpm_io.atomic import atomic_path
from esddpm_io.errors import UserError
from esddpm_io.files import check_output_folder
from esddpm_io.optional import import_extra

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50

FORMATS = ("stdout", "log", "csv", "json", "tensorboard", "wandb")
_KEY_WIDTH = 30  # characters of a name in the table; longer ones are cut


class KVWriter:
    """Somewhere rows of figures go."""

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing more will be written."""


class SeqWriter:
    """Somewhere messages go."""

    def writeseq(self, seq: list[str]) -> None:
        raise NotImplementedError


class HumanOutputFormat(KVWriter, SeqWriter):
    """A table of two columns a row, and messages a line; to a stream or appended to a file.

    Without a file they go to stdout as it is when they are written: notebooks and test runners
    put another in its place, and close the one before.
    """

    def __init__(self, filename_or_file: str | os.PathLike | TextIO | None = None):
        self.own_file = isinstance(filename_or_file, str | os.PathLike)
        self.file = (
            open(filename_or_file, "a", encoding="utf-8") if self.own_file else filename_or_file
        )

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        cells = {name[:_KEY_WIDTH]: _short(value) for name, value in sorted(kvs.items())}
        if not cells:
            return
        left, right = max(map(len, cells)), max(map(len, cells.values()))
        rule = "-" * (left + right + 7)
        lines = [rule, *(f"| {n:<{left}} | {v:<{right}} |" for n, v in cells.items()), rule]
        self._write("\n".join(lines))

    def writeseq(self, seq: list[str]) -> None:
        self._write(" ".join(seq))

    def close(self) -> None:
        if self.own_file:
            self.file.close()

    def _write(self, text: str) -> None:
        # In one piece, for other processes may write to the same place.
        print(f"{text}\n", end="", file=self.file, flush=True)


class JSONOutputFormat(KVWriter):
    """A JSON object a line, appended."""

    def __init__(self, filename: str | os.PathLike):
        self.file = open(filename, "a", encoding="utf-8")

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        self.file.write(json.dumps({name: _plain(value) for name, value in kvs.items()}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class CSVOutputFormat(KVWriter):
    """A table in a file; a resumed run appends to it, and a new figure adds a column to it."""

    def __init__(self, filename: str | os.PathLike):
        self._path = Path(filename)
        self.keys = self._read_header()
        self.file = open(self._path, "a", encoding="utf-8", newline="")

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        added = sorted(kvs.keys() - set(self.keys))
        if added:
            self._add_columns(added)
        row = [_plain(kvs[name]) if name in kvs else "" for name in self.keys]
        csv.writer(self.file).writerow(row)
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    def _read_header(self) -> list[str]:
        if not self._path.exists():
            return []
        with open(self._path, encoding="utf-8", newline="") as file:
            return next(csv.reader(file), [])

    def _add_columns(self, added: list[str]) -> None:
        """Write the file anew with a longer header; rows already there get empty cells."""
        self.file.close()
        with open(self._path, encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[1:]
        self.keys += added
        with (
            atomic_path(self._path) as temporary,
            open(temporary, "w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(self.keys)
            writer.writerows(row + [""] * (len(self.keys) - len(row)) for row in rows)
        self.file = open(self._path, "a", encoding="utf-8", newline="")


class TensorBoardOutputFormat(KVWriter):
    """Event files for TensorBoard; the x axis is the figure "step" where there is one."""

    def __init__(self, dir: str | os.PathLike):
        what = "OPENAI_LOG_FORMAT: tensorboard"
        tensorboard = import_extra("torch.utils.tensorboard", what, "tensorboard")
        self.dir = dir
        self.writer = tensorboard.SummaryWriter(os.fspath(dir))
        self.step = 0

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        self.step += 1
        step = int(kvs.get("step", self.step))
        for name, value in kvs.items():
            self.writer.add_scalar(name, float(value), step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbOutputFormat(KVWriter):
    """A run of Weights & Biases, by its own settings (WANDB_PROJECT, WANDB_MODE …).

    The run's id stays in the folder, in wandb_id.txt, so that a resumed training goes on in it. The
    x axis is the figure "step" where there is one.
    """

    def __init__(self, dir: str | os.PathLike):
        wandb = import_extra("wandb", "OPENAI_LOG_FORMAT: wandb", "wandb")
        folder = Path(dir)
        kept = folder / "wandb_id.txt"
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex)
        name = folder.resolve().name
        self.run = wandb.init(dir=str(folder), id=kept.read_text(), name=name, resume="allow")
        # A resumed run may make steps again: wandb's own counter would drop them.
        self.run.define_metric("*", step_metric="step")

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        self.run.log({name: _plain(value) for name, value in kvs.items()})

    def close(self) -> None:
        self.run.finish()


def make_output_format(format: str, ev_dir: str | os.PathLike, log_suffix: str = "") -> KVWriter:
    """The output called `format` in the folder `ev_dir`; UserError if there is no such format."""
    folder = Path(ev_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if format == "stdout":
        return HumanOutputFormat()
    if format == "log":
        return HumanOutputFormat(folder / f"log{log_suffix}.txt")
    if format == "csv":
        return CSVOutputFormat(folder / f"progress{log_suffix}.csv")
    if format == "json":
        return JSONOutputFormat(folder / f"progress{log_suffix}.json")
    if format == "tensorboard":
        return TensorBoardOutputFormat(folder / f"tb{log_suffix}")
    if format == "wandb":
        return WandbOutputFormat(folder)
    raise UserError(
        f'OPENAI_LOG_FORMAT: there is no format "{format}", choose from {", ".join(FORMATS)}',
        got=format,
        valid=FORMATS,
    )


class Logger:
    """Figures that wait for the next row, and the outputs that rows and messages go to."""

    CURRENT: "Logger | None" = None

    def __init__(self, dir: str | None, output_formats: list[KVWriter], comm: Any = None):
        self.dir = dir
        self.output_formats = output_formats
        self.level = INFO
        self.comm = comm
        self.name2val: dict[str, Any] = defaultdict(float)
        self.name2cnt: dict[str, int] = defaultdict(int)

    def logkv(self, key: str, val: Any) -> None:
        self.name2val[key] = val
        self.name2cnt.pop(key, None)

    def logkv_mean(self, key: str, val: float) -> None:
        if val is None:
            return
        count = self.name2cnt[key]
        self.name2val[key] = (self.name2val[key] * count + val) / (count + 1)
        self.name2cnt[key] = count + 1

    def dumpkvs(self) -> dict[str, Any]:
        row = dict(self.name2val)
        if self.comm is not None:
            row = self._mean_over_ranks(row)
        for output in self.output_formats:
            if row and isinstance(output, KVWriter):
                output.writekvs(row)
        self.name2val.clear()
        self.name2cnt.clear()
        return row

    def log(self, *args: Any, level: int = INFO) -> None:
        if level < self.level:
            return
        for output in self.output_formats:
            if isinstance(output, SeqWriter):
                output.writeseq([str(arg) for arg in args])

    def set_level(self, level: int) -> None:
        self.level = level

    def set_comm(self, comm: Any) -> None:
        self.comm = comm

    def get_dir(self) -> str | None:
        return self.dir

    def close(self) -> None:
        for output in self.output_formats:
            output.close()

    def _mean_over_ranks(self, row: dict[str, Any]) -> dict[str, Any]:
        mine = {name: (value, self.name2cnt.get(name, 1)) for name, value in row.items()}
        return mpi_weighted_mean(self.comm, mine)


def mpi_weighted_mean(comm: Any, local_name2valcount: Mapping[str, tuple]) -> dict[str, Any]:
    """Means of {name: (value, count)} over the processes of an mpi4py communicator.

    Weighted by counts; rank 0 gets them, the others an empty dict.
    """
    rows = comm.gather(dict(local_name2valcount), root=0)
    if rows is None:
        return {}
    merged = {}
    for name in {name for part in rows for name in part}:
        pairs = [part[name] for part in rows if name in part]
        if len({value for value, _ in pairs}) == 1:
            merged[name] = pairs[0][0]  # a step stays an integer
            continue
        total = sum(count for _, count in pairs)
        merged[name] = sum(value * count for value, count in pairs) / total
    return merged


def get_rank_without_mpi_import() -> int:
    """This process's rank as its launcher's variables tell it."""
    from guided_diffusion import dist_util

    return dist_util.find_launch().rank


def configure(
    dir: str | None = None,
    format_strs: list[str] | None = None,
    comm: Any = None,
    log_suffix: str = "",
) -> None:
    """Open the outputs that all functions of this module write to.

    `dir` defaults to `OPENAI_LOGDIR` or a new folder openai-DATE in the temporary folder (rank 0's
    for all ranks, once they have met). `comm` is an mpi4py communicator over which rows are
    averaged, for code that wants that. UserError for an unknown format or a folder that cannot be
    made.
    """
    from guided_diffusion import dist_util

    rank = dist_util.rank() or get_rank_without_mpi_import()
    if dir is None:
        dated = datetime.datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f")
        dir = os.environ.get("OPENAI_LOGDIR") or os.path.join(tempfile.gettempdir(), dated)
        dir = dist_util.gather_objects(dir)[0]
    if "://" in dir:
        raise UserError(
            f"OPENAI_LOGDIR: {dir} is not on a disk: give a local folder and copy it afterwards"
        )
    dir = os.path.expanduser(dir)
    check_output_folder(dir, flag="OPENAI_LOGDIR")
    os.makedirs(dir, exist_ok=True)
    if format_strs is None:
        variable, default = ("OPENAI_LOG_FORMAT", "stdout,log,csv")
        if rank > 0:
            variable, default = ("OPENAI_LOG_FORMAT_MPI", "log")
        format_strs = os.environ.get(variable, default).split(",")
    if rank > 0:
        log_suffix += f"-rank{rank:03d}"
    outputs = [make_output_format(name, dir, log_suffix) for name in format_strs if name]
    get_current().close()
    Logger.CURRENT = Logger(dir, outputs, comm)
    if outputs:
        log(f"Logging to {dir}")


def reset() -> None:
    """Close what `configure` opened: messages go to stdout again, figures too."""
    get_current().close()
    Logger.CURRENT = None


@contextlib.contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: list[str] | None = None, comm: Any = None
) -> Iterator[None]:
    """`configure` for the length of a block."""
    before = get_current()
    # A logger of its own to close, so that the one from before stays open.
    Logger.CURRENT = Logger(None, [])
    try:
        configure(dir, format_strs, comm)
        yield
    finally:
        get_current().close()
        Logger.CURRENT = before


def get_current() -> Logger:
    """The logger in use; before `configure`, one that writes to stdout and has no folder."""
    if Logger.CURRENT is None:
        Logger.CURRENT = Logger(None, [HumanOutputFormat()])
    return Logger.CURRENT


def logkv(key: str, val: Any) -> None:
    """Set a figure of the next row."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: float) -> None:
    """Add a value to a figure of the next row that is the mean of all its values."""
    get_current().logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """Set several figures."""
    for key, val in d.items():
        logkv(key, val)


def dumpkvs() -> dict[str, Any]:
    """Write the waiting figures as one row, forget them, and return them."""
    return get_current().dumpkvs()


def getkvs() -> dict[str, Any]:
    """The waiting figures."""
    return get_current().name2val


def log(*args: Any, level: int = INFO) -> None:
    """Write a message, if `level` is at least that of `set_level`."""
    get_current().log(*args, level=level)


def debug(*args: Any) -> None:
    """A message at level DEBUG."""
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    """A message at level INFO."""
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    """A message at level WARN."""
    log(*args, level=WARN)


def error(*args: Any) -> None:
    """A message at level ERROR."""
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """Leave out messages below `level` from now on."""
    get_current().set_level(level)


def set_comm(comm: Any) -> None:
    """Average rows over this mpi4py communicator from now on (None: do not)."""
    get_current().set_comm(comm)


def get_dir() -> str | None:
    """The folder of the run, None before `configure`."""
    return get_current().get_dir()


record_tabular = logkv
dump_tabular = dumpkvs


@contextlib.contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the seconds a block takes to the figure wait_SCOPENAME."""
    start = time.perf_counter()
    try:
        yield
    finally:
        get_current().name2val[f"wait_{scopename}"] += time.perf_counter() - start


def profile(n: str) -> contextlib.ContextDecorator:
    """Decorator: `profile_kv(n)` around every call."""
    return profile_kv(n)


def _plain(value: Any) -> Any:
    """A Python number out of a NumPy or torch scalar; text and numbers stay as they are."""
    return value.item() if hasattr(value, "item") else value


def _short(value: Any) -> str:
    value = _plain(value)
    return f"{value:<8.3g}".strip() if isinstance(value, float) else str(value)[:_KEY_WIDTH]
