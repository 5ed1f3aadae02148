import errno
import json
import os
import subprocess
import sys

import pytest

from esddpm_io.atomic import atomic_path, write_json
from esddpm_io.errors import Terminated, UserError, run_main
from esddpm_io.progress import Progress, progress_text


def test_atomic_path_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_write_json(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"a": [1, 2.5]})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"a": [1, 2.5]}


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--x: bad"), 2, "error: --x: bad\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Terminated(), 143, "terminated\n"),
        (OSError(errno.ENOSPC, "No space", "f.npz"), 74, "error: the disk is full while writing f"),
    ],
)
def test_run_main_says_one_line(capsys, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    assert stopped.value.code == code
    assert capsys.readouterr().err.startswith(line)


def test_run_main_lets_bugs_through():
    def main():
        raise OSError(errno.EACCES, "Permission denied")

    with pytest.raises(OSError, match="Permission"):
        run_main(main)


def test_progress_in_a_log_is_sparse(capsys):
    with Progress(1000, "images", "sampling") as progress:
        for _ in range(1000):
            progress.update(1, note="batch of 1")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("sampling: 1000/1000 images (100%)")
    assert lines[0].endswith("; batch of 1")
    assert progress_text(30, 120, "images", 1.5) == "30/120 images (25%), 1.5 images/s, 1:00 left"


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sys, esddpm_io.images, esddpm_io.progress, esddpm_io.errors;"
        "print([m for m in ('torch', 'tensorflow', 'blobfile', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
