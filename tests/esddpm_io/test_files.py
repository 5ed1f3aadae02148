import errno
import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest

from esddpm_io.atomic import atomic_path, write_json
from esddpm_io.errors import Terminated, UserError, run_main
from esddpm_io.files import check_output_file, check_output_folder, read_json, sha256, short_names
from esddpm_io.processes import run_to_end
from esddpm_io.progress import Progress, progress_text
from tests.waiting import PATIENCE_S


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
        (PermissionError(errno.EACCES, "Permission denied", "f"), 2, "error: cannot use f: Perm"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/f"), 2, "error: cannot use a/f: "),
        (FileExistsError(errno.EEXIST, "File exists", "a"), 2, "error: a is in the way: it is not"),
        (OSError(errno.ESTALE, "Stale file handle", "f"), 1, "error: cannot use f: Stale"),
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
        raise OSError("no errno, no file")

    with pytest.raises(OSError, match="no errno"):
        run_main(main)


def test_a_reader_that_has_enough_is_no_error():
    code = (
        "from esddpm_io.errors import run_main\n"
        "def main():\n"
        "    while True: print('line', flush=True)\n"
        "run_main(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def test_outputs_are_checked_before_they_are_written(tmp_path):
    (tmp_path / "afile").touch()
    check_output_file(tmp_path / "new" / "deep" / "a.json", flag="--json")
    check_output_folder(tmp_path / "new", flag="--output_dir")
    assert os.listdir(tmp_path) == ["afile"]
    for bad, words in {
        tmp_path: "is a folder: give the name of a file",
        tmp_path / "afile" / "x.npz": "afile is not a folder",
        "/proc/x/y.json": "cannot be written: ",
        "/dev/null": "is not a file that could be replaced",
    }.items():
        with pytest.raises(UserError, match=f"--out: {bad}.*{words}"):
            check_output_file(bad, flag="--out")
    for bad in (tmp_path / "afile", tmp_path / "afile" / "x", "/proc/x"):
        with pytest.raises(UserError, match=f"--output_dir: {bad} cannot be written: "):
            check_output_folder(bad, flag="--output_dir")


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"half": ')
    with pytest.raises(UserError, match=r"a\.json is damaged: it is not JSON"):
        read_json(tmp_path / "a.json")
    assert read_json(tmp_path / "a.json" / "none.json") is None


CHILD = """
import sys, time
from esddpm_io.errors import run_main, terminate_cleanly
from esddpm_io.atomic import atomic_path
def main():
    terminate_cleanly()
    with atomic_path(sys.argv[1]) as temporary:
        temporary.write_text("half")
        print("writing", flush=True)
        time.sleep(600)
run_main(main)
"""
PARENT = """
import sys
from esddpm_io.errors import run_main, terminate_cleanly
from esddpm_io.processes import run_to_end
terminate_cleanly()
run_main(lambda: sys.exit(run_to_end([sys.executable, "-c", *sys.argv[1:]])))
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_child_ends_with_its_parent_and_cleans_up(tmp_path, signum, code):
    # Two generations: what gets the signal, a parent of its own, and the one that writes.
    argv = [sys.executable, "-c", PARENT, PARENT, CHILD, str(tmp_path / "out")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signum)
    _, err = process.communicate(timeout=PATIENCE_S)  # the pipes close once all have ended
    assert process.returncode == code
    assert err.splitlines() == [*["terminated"] * 2, "interrupted" if code == 130 else "terminated"]
    assert os.listdir(tmp_path) == []


SWALLOWING = """
import os, signal, sys, time
from esddpm_io.errors import run_main, terminate_cleanly
class Deaf:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)  # the error is printed and forgotten
def main():
    terminate_cleanly()
    if sys.argv[1] == "del":
        Deaf()
    else:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except:
            pass
    try:
        time.sleep(600)
    finally:
        for _ in range(30):  # longer than one look; more signals do not cut it short
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        print("clean")
run_main(main)
"""


@pytest.mark.parametrize("how", ["del", "except"])
def test_a_sigterm_that_a_package_swallows_comes_again(how):
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWING, how],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (done.returncode, done.stdout) == (143, "clean\n")
    assert done.stderr.endswith("terminated\n")


LEAVING = """
import atexit, os, signal, time
from esddpm_io.errors import run_main, terminate_cleanly
def last():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2.5)
    print("left")
atexit.register(last)
def main():
    terminate_cleanly()
    os.kill(os.getpid(), signal.SIGTERM)
run_main(main)
"""


def test_an_exit_under_way_is_not_cut():
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "left\n", "terminated\n")


def test_a_child_that_a_signal_ended_has_a_shell_s_exit_code():
    argv = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert run_to_end(argv) == 137


def test_progress_in_a_log_is_sparse(capsys):
    with Progress(1000, "images", "sampling") as progress:
        for _ in range(1000):
            progress.update(1, note="batch of 1")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0] == "sampling: 1000 images"
    assert lines[1].startswith("sampling: 1000/1000 images (100%)")
    assert lines[1].endswith("; batch of 1")
    assert progress_text(30, 120, "images", 1.5) == "30/120 images (25%), 1.5 images/s, 1:00 left"


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sys, esddpm_io.images, esddpm_io.progress, esddpm_io.errors;"
        "print([m for m in ('torch', 'tensorflow', 'blobfile', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_sha256_of_a_folder_is_that_of_its_names_and_contents(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"one")
    (folder / "b.png").write_bytes(b"two")
    first = sha256(folder)
    assert sha256(folder / "a.png") == hashlib.sha256(b"one").hexdigest() != first
    (folder / ".hidden").touch()
    assert sha256(folder) == first
    (folder / "b.png").rename(folder / "c.png")
    assert sha256(folder) != first
    with pytest.raises(UserError, match="--again: there is no file"):
        sha256(tmp_path / "none", flag="--again")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/b.npz"], ["b.npz"]),
        (["/a/b.npz", "c.npz"], ["b.npz", "c.npz"]),
        (["/r/t1/s.npz", "/r/t2/s.npz"], ["t1/s.npz", "t2/s.npz"]),
        (["/r/t1/out/s", "/r/t2/out/s", "/r/t2/out/s/"], ["t1/out/s", "t2/out/s", "t2/out/s"]),
        (["/r/ref.npz", "/r/t1/s", "/r/t2/s"], ["ref.npz", "t1/s", "t2/s"]),
        (["s.npz", "a/s.npz"], ["s.npz", "a/s.npz"]),
        (["/s.npz", "s.npz"], ["/s.npz", "s.npz"]),
        ([], []),
    ],
)
def test_as_much_of_a_path_as_tells_it_apart(paths, names):
    assert short_names(paths) == names
