import contextlib
import csv
import io
import json
import sys

import pytest
import torch

from esddpm_io.errors import UserError
from guided_diffusion import logger
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def clean_logger():
    yield
    logger.reset()


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_figures_go_to_every_output(tmp_path, capsys):
    logger.configure(str(tmp_path), ["stdout", "log", "csv", "json"])
    logger.logkv("step", 3)
    for value in (1.0, 2.0, 6.0):
        logger.logkv_mean("loss", value)
    logger.logkvs({"lr": 1e-4})
    assert logger.dumpkvs() == {"step": 3, "loss": 3.0, "lr": 1e-4}
    assert logger.getkvs() == {}
    assert rows(tmp_path / "progress.csv") == [{"loss": "3.0", "lr": "0.0001", "step": "3"}]
    assert json.loads((tmp_path / "progress.json").read_text()) == {
        "step": 3,
        "loss": 3.0,
        "lr": 1e-4,
    }
    for text in (capsys.readouterr().out, (tmp_path / "log.txt").read_text()):
        assert "| loss | 3      |" in text and "| lr   | 0.0001 |" in text


@pytest.mark.parametrize("configured", [True, False])
def test_messages_go_to_the_stdout_of_their_time(tmp_path, capsys, configured):
    with contextlib.redirect_stdout(io.StringIO()) as first:
        if configured:
            logger.configure(str(tmp_path), ["stdout"])
        logger.log("one")
    assert first.getvalue().endswith("one\n")
    first.close()
    logger.log("two")
    assert capsys.readouterr().out == "two\n"


def test_csv_grows_columns_and_a_second_run_appends(tmp_path):
    logger.configure(str(tmp_path), ["csv", "log"])
    logger.logkv("b", 1)
    logger.dumpkvs()
    logger.logkvs({"a": 2, "b": 3})
    logger.dumpkvs()
    logger.configure(str(tmp_path), ["csv", "log"])
    logger.logkv("a", 4)
    logger.dumpkvs()
    assert rows(tmp_path / "progress.csv") == [
        {"b": "1", "a": ""},
        {"b": "3", "a": "2"},
        {"b": "", "a": "4"},
    ]
    assert (tmp_path / "log.txt").read_text().count("Logging to") == 2


def test_environment_decides_folder_and_formats(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "deep/run"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json,log")
    logger.configure()
    assert logger.get_dir() == str(tmp_path / "deep/run")
    assert {p.name for p in (tmp_path / "deep/run").iterdir()} == {"progress.json", "log.txt"}


@pytest.mark.parametrize("folder", ["gs://bucket/run", "afile", "afile/run", "/sys"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").touch()
    monkeypatch.setenv("OPENAI_LOGDIR", folder)
    with pytest.raises(UserError, match=f"^OPENAI_LOGDIR: {folder} (is not on a disk|cannot be)"):
        logger.configure()
    assert [path.name for path in tmp_path.iterdir()] == ["afile"]


def test_other_ranks_write_only_a_log_of_their_own(tmp_path, monkeypatch):
    for name, value in {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    logger.configure(str(tmp_path))
    logger.log("here")
    assert [p.name for p in tmp_path.iterdir()] == ["log-rank002.txt"]


def test_dated_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    logger.configure(format_strs=["log"])
    assert logger.get_dir().startswith(str(tmp_path / "openai-2"))


def test_tensorboard_files_can_be_read(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger.configure(str(tmp_path), ["tensorboard"])
    for step, loss in ((10, 0.5), (20, 0.25)):
        logger.logkvs({"step": step, "loss": loss})
        logger.dumpkvs()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 0.5), (20, 0.25)]


def test_wandb_gets_the_figures_and_a_resumed_run_goes_on_in_its_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step, loss in ((10, 0.5), (20, torch.tensor(0.25))):
        logger.configure(str(tmp_path), ["wandb"])
        logger.logkvs({"step": step, "loss": loss})
        logger.dumpkvs()
        logger.reset()
    runs = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    name = (tmp_path / "wandb_id.txt").read_text()
    assert [path.name for path in runs] == [f"run-{name}.wandb"] * 2
    # A process of wandb's writes them, perhaps after we have left the run.
    for part in (b"step", b"loss", b"0.5", b"0.25"):
        wait_until(lambda part=part: any(part in path.read_bytes() for path in runs))


def test_wandb_is_a_package_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="^OPENAI_LOG_FORMAT: wandb needs .*pip install wandb$"):
        logger.configure(str(tmp_path), ["wandb"])


def test_unknown_format_is_named(tmp_path):
    with pytest.raises(UserError, match="OPENAI_LOG_FORMAT.*xml.*stdout"):
        logger.configure(str(tmp_path), ["xml"])


def test_levels_scopes_and_times(tmp_path, capsys):
    logger.configure(str(tmp_path / "outer"), ["log"])
    logger.set_level(logger.WARN)
    logger.info("quiet")
    logger.warn("loud")
    with logger.scoped_configure(str(tmp_path / "inner"), ["log"]):
        logger.info("inside")
    logger.error("outside")

    @logger.profile("work")
    def work():
        return 5

    assert work() == 5 and logger.getkvs()["wait_work"] >= 0
    outer = (tmp_path / "outer/log.txt").read_text()
    assert outer.split("\n")[1:] == ["loud", "outside", ""]
    assert "inside" in (tmp_path / "inner/log.txt").read_text()


class Communicator:
    """Two processes' worth of mpi4py's `gather`: this one's rows, and a second row given before."""

    def __init__(self, other):
        self.other = other

    def gather(self, mine, root):
        return [mine, self.other]


def test_rows_are_averaged_over_a_communicator():
    other = {"loss": (5.0, 3), "extra": (1.0, 1), "step": (7, 1)}
    outputs = logger.Logger(None, [], comm=Communicator(other))
    outputs.logkv_mean("loss", 1.0)
    outputs.logkv("step", 7)
    row = outputs.dumpkvs()
    assert row == {"loss": 4.0, "extra": 1.0, "step": 7} and isinstance(row["step"], int)
