"""Several processes, each with its share of the images: the figures of one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from esddpm_io.errors import UserError
from esddpm_io.images import save_png
from esddpm_io.launch import ALONE, Launch
from evaluations import devices, evaluate, evaluation, evaluator
from evaluations.devices import extract_among_ranks, shares_of
from evaluations.evaluation import assist, run
from evaluations.features import choose_engine, load_graph, read_ahead
from evaluations.inputs import ArrayImages
from evaluations.moments import gaussian_of, merged
from evaluations.scoring import METRICS
from tests.evaluations.graph_writer import GOLDEN, small_graph
from tests.waiting import PATIENCE_S, wait_until

EVALUATOR = Path(__file__).resolve().parents[2] / "evaluations" / "evaluator.py"
OPTIONS = {"inception_path": "small.pb", "backend": "torch", "batch_size": 8}
FLAGS = [text for name, value in OPTIONS.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a small graph and two sets of images, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("small.pb").write_bytes(small_graph())
    with np.load(GOLDEN / "evaluator_images.npz") as file:
        np.savez("reference.npz", arr_0=file["reference"][:60])
        np.savez("samples.npz", arr_0=file["samples"][:50])
    return tmp_path


def figures(path):
    return json.loads(Path(path).read_text())["results"][0]["metrics"]


def assert_figures_of_one_process(path):
    one = evaluate("reference.npz", "samples.npz", **OPTIONS).results[0].metrics
    assert figures(path) == {
        METRICS[name].key: pytest.approx(value.value, rel=1e-9) for name, value in one.items()
    }


@pytest.mark.parametrize("parts", [[5, 9], [9, 40, 1], [40, 60], [100]])
def test_moments_merge_exactly(parts):
    features = np.random.default_rng(0).standard_normal((sum(parts), 20)) + 100
    pieces = np.split(features, np.cumsum(parts)[:-1])
    got, expected = merged([gaussian_of(piece) for piece in pieces]), gaussian_of(features)
    assert got.count == expected.count
    np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-13)
    np.testing.assert_allclose(got.full_covariance(), expected.full_covariance(), atol=1e-11)
    assert (got.rows is None) == (expected.rows is None)


def test_shares_are_whole_batches():
    assert shares_of(50, 2, 8) == [(0, 32), (32, 50)]
    assert shares_of(50, 1, 64) == [(0, 50)]
    assert len(shares_of(50_000, 2, 64)) == 7


def test_two_processes_give_the_figures_of_one_and_go_on_after_a_kill(here):
    """Killed when one process has stored its share and the other is stopped in the middle of its:
    the second run finds that share, and leaves whole sets only.
    """
    command = [sys.executable, EVALUATOR, "reference.npz", "samples.npz", *FLAGS]
    command += ["--devices", "cpu,cpu", "--cache_dir", "cache", "--json", "out.json"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    workers = wait_until(lambda: len(found := workers_of(first.pid)) == 2 and found, first)
    os.kill(workers[0], signal.SIGSTOP)
    wait_until(lambda: list(Path("cache").glob("features-*.npz")), first)
    first.kill()
    os.kill(workers[0], signal.SIGKILL)  # the other sees that its parent is gone
    first.communicate()
    (share,) = Path("cache").glob("features-*.npz")
    start, stop = map(int, share.stem.split("-")[-2:])

    again = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert f"features of reference.npz, {stop - start} of them stored already" in again.stderr
    assert_figures_of_one_process("out.json")
    assert len(list(Path("cache").iterdir())) == 2 and not share.exists()


def test_one_process_with_a_cache_goes_on_where_it_was_killed(here, monkeypatch, capsys):
    monkeypatch.setattr(devices, "_MOST_IMAGES", 16)
    options = {**OPTIONS, "cache_dir": "cache"}
    seen, failing = [], [True]

    class Engine:
        name = "torch"

        def __init__(self, engine):
            self._engine = engine

        def __call__(self, images):
            seen.append(len(images))
            if failing and sum(seen) > 2 * 2 + 32:
                raise KeyboardInterrupt
            return self._engine(images)

    choose = evaluation.choose_engine
    monkeypatch.setattr(evaluation, "choose_engine", lambda *args: Engine(choose(*args)))
    with pytest.raises(KeyboardInterrupt):
        run("reference.npz", "samples.npz", tell=print, **options)
    ranges = sorted(path.stem.split("-", 2)[2] for path in Path("cache").iterdir())
    assert ranges == ["0-16", "16-32"]
    failing.clear()
    seen.clear()
    capsys.readouterr()
    found = run("reference.npz", "samples.npz", tell=print, **options)
    assert sum(seen) == 2 * 2 + (60 - 32) + 50  # two of each set are tried
    lines = [line for line in capsys.readouterr().err.splitlines() if "features of ref" in line]
    assert lines[0] == "features of reference.npz, 32 of them stored already: 60 images"
    assert len(lines) == 2 and "60/60 images (100%)" in lines[1]
    one = evaluate("reference.npz", "samples.npz", **OPTIONS)
    for name, value in one.results[0].metrics.items():
        assert found.results[0][name] == pytest.approx(value.value, rel=1e-9)
    assert len(list(Path("cache").iterdir())) == 2


def test_every_device_does_a_share(here, monkeypatch):
    """None takes one before all are there; then each has one to do before it can take another."""
    all_there, done, hand_out = threading.Barrier(2), [], devices._hand_out

    def recorded(waiting, connection, arguments, keep):
        all_there.wait(PATIENCE_S)
        mine = []
        done.append(mine)
        hand_out(
            waiting, connection, arguments, lambda *share: (mine.append(share[0]), keep(*share))
        )

    monkeypatch.setattr(devices, "_hand_out", recorded)
    evaluate("reference.npz", "samples.npz", devices="cpu,cpu", **OPTIONS)
    assert len(done) == 4 and all(len(mine) == 1 for mine in done)  # two of each set of images


def workers_of(parent):
    """The processes that `parent` has started for its devices."""
    found = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in (task / "children").read_text().split():
            if b"--multiprocessing-fork" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def test_files_that_are_others_than_those_that_were_checked_are_refused(here, monkeypatch):
    """By the processes, which open them again, hours later perhaps."""
    for index, image in enumerate(np.load("samples.npz")["arr_0"]):
        save_png(f"folder/{index}.png", image)
    extract_on_devices = evaluation.extract_on_devices

    def late(image_set, *args, **options):
        if image_set.name == "folder":
            Path("folder/3.png").unlink()
        return extract_on_devices(image_set, *args, **options)

    monkeypatch.setattr(evaluation, "extract_on_devices", late)
    with pytest.raises(UserError, match="^samples: folder has changed since it was checked$"):
        evaluate("reference.npz", "folder", devices="cpu,cpu", **OPTIONS)


def test_the_crc_of_a_set_is_checked_though_no_process_reads_all_of_it(here):
    """Of images beyond those that are looked at beforehand."""
    images = np.load("reference.npz")["arr_0"].repeat(3, axis=0)
    np.savez("bad.npz", arr_0=images)
    data = bytearray(Path("bad.npz").read_bytes())
    data[len(data) * 9 // 10] ^= 1
    Path("bad.npz").write_bytes(data)
    for sets, flag in (
        (["bad.npz", images[:50]], "reference"),
        ([images[:50], "bad.npz"], "samples"),
    ):
        with pytest.raises(UserError, match=rf"^{flag}: arr_0 in bad\.npz is not .*CRC-32"):
            evaluate(*sets, devices="cpu,cpu", **OPTIONS)


def test_the_first_error_is_told_at_once(here, monkeypatch):
    """Not when the processes before it are done: this one waits for work until it is ended."""

    def hand_out(waiting, connection, arguments, keep):
        if waiting.qsize() == 2:
            waiting.get()
            connection.poll(PATIENCE_S)
            return
        raise UserError("at once")

    monkeypatch.setattr(devices, "_hand_out", hand_out)
    started = time.monotonic()
    with pytest.raises(UserError, match="^at once$"):
        evaluate("reference.npz", "samples.npz", devices="cpu,cpu", **OPTIONS)
    assert time.monotonic() - started < PATIENCE_S


def test_a_script_without_a_guard_ends_with_a_line(here):
    """Its processes end when they import it again, before they read what they are to do."""
    Path("script.py").write_text(
        "import numpy as np\n"
        "from evaluations import evaluate\n"
        "images = np.load('reference.npz')['arr_0'].repeat(4, axis=0)\n"
        "assert images.nbytes > 1 << 17\n"  # more than a pipe holds
        "evaluate(images, images, devices='cpu,cpu', inception_path='small.pb', metrics='fid')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(EVALUATOR.parents[1])}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=env)
    assert done.returncode == 1
    assert (
        "devices: the process on cpu has died: for want of memory, or of a guard"
        in done.stderr.splitlines()[-1]
    )


def test_a_device_that_is_not_there_is_named(here):
    with pytest.raises(UserError, match="^device cuda:99"):
        evaluate("reference.npz", "samples.npz", devices="cpu,99", inception_path="small.pb")


def test_the_next_images_are_read_while_the_network_is_busy():
    """It is at the first batch until the second has been read."""
    read = [threading.Event() for _ in range(3)]

    class Source(ArrayImages):
        def read(self, start, stop):
            read[start // 4].set()
            return super().read(start, stop)

    source = Source(np.zeros((12, 2, 2, 3), np.uint8), flag="REF")
    for start, batch in read_ahead(source, 0, 12, 4):
        following = read[min(start // 4 + 1, 2)]
        assert following.wait(PATIENCE_S) and len(batch) == 4


MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or "mpiexec"
LAUNCHERS = {
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", "--nproc_per_node", "2"),
    ],
    "mpiexec": [MPIEXEC, "-n", "2", sys.executable],
}


@pytest.fixture(params=LAUNCHERS)
def launched(request, here):
    """Runs the evaluator by a launcher, with these flags."""
    if request.param == "mpiexec" and shutil.which(MPIEXEC) is None:
        pytest.skip("mpiexec is not installed")

    def call(*flags):
        command = [*LAUNCHERS[request.param], EVALUATOR, "reference.npz", "samples.npz", *FLAGS]
        command += flags
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)

    return call


def test_a_launcher_s_processes_share_the_images(launched):
    done = launched("--cache_dir", "cache", "--json", "out.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sFID") + done.stdout.count("Spatial Frechet") == 1  # one prints
    assert_figures_of_one_process("out.json")
    assert len(list(Path("cache").iterdir())) == 2
    again = launched("--cache_dir", "cache")
    assert again.returncode == 0 and "features of" not in again.stderr


def test_a_launcher_s_processes_end_with_an_error_of_the_user(launched):
    done = launched()
    assert done.returncode != 0 and "Traceback" not in done.stderr.split("torch/distributed")[0]
    assert "error: --cache_dir: 2 processes of" in done.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "--cache_dir: 3 processes of slurm need one folder"),
        ({"devices": "cpu,cpu", "cache_dir": "cache"}, "--devices starts processes of its own"),
        ({"inception_path": None, "cache_dir": "cache"}, "run scripts/download.py first"),
        ({"expect": 50, "cache_dir": "cache"}, "--expect cannot go with 3 processes"),
    ],
)
def test_what_a_launch_cannot_do_is_refused(here, monkeypatch, given, words):
    monkeypatch.setenv("ES_DDPM_CACHE", str(here / "empty"))
    launch = Launch("slurm", 0, 3, 0)
    for call in (run, assist):
        more = {"tell": print} if call is run else {}
        with pytest.raises(UserError, match=words):
            options = {**OPTIONS, **given}
            call("reference.npz", "samples.npz", launch=launch, **more, **options)


def test_one_process_of_a_launch_finishes_what_others_left(here):
    """srun lets the others live when one of its processes dies: nothing must wait for that one."""
    options = {**OPTIONS, "cache_dir": "cache"}
    first = run(
        "reference.npz", "samples.npz", tell=print, launch=Launch("slurm", 0, 3, 0), **options
    )
    one = evaluate("reference.npz", "samples.npz", **OPTIONS)
    for name, value in one.results[0].metrics.items():
        assert first.results[0][name] == pytest.approx(value.value, rel=1e-9)
    before = sorted((path, path.stat().st_mtime_ns) for path in Path("cache").iterdir())
    # One that comes late finds all done, and leaves nothing behind.
    assist("reference.npz", "samples.npz", launch=Launch("slurm", 2, 3, 2), **options)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in Path("cache").iterdir())


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_process_does_its_share_and_opens_no_image_of_others_that_is_done(here, rank):
    images = np.load("reference.npz")["arr_0"]
    engine = choose_engine(load_graph("small.pb"), "torch")
    store = here / "whole.npz"
    shares = shares_of(len(images), 3, 8)
    source = ArrayImages(images, flag="REF")
    for share, path in devices._paths(store, shares).items():
        if share != shares[rank]:
            part = devices.extract(engine, source, name="", batch_size=8, share=share)
            devices.FeatureCache.save(path, part)
    read, seen = [], []

    class Source(ArrayImages):
        def read(self, start, stop):
            read.append((start, stop))
            return super().read(start, stop)

    def counting(batch):
        seen.append(len(batch))
        return engine(batch)

    options = {"name": "", "batch_size": 8, "keep_spatial": False, "store": store}
    launch = Launch("mpi", rank, 3, rank)
    source = Source(images, flag="REF")
    got = extract_among_ranks(counting, source, launch, dimensions=24, **options)
    assert (read[0][0], read[-1][1]) == shares[rank] and sum(seen) == np.diff(shares[rank])
    if rank == 0:
        expected = devices.extract(engine, source, name="", batch_size=8)
        np.testing.assert_array_equal(got.pool, expected.pool)


def test_a_process_that_is_not_the_first_is_not_idle(here, monkeypatch, capfd):
    """Where the first does nothing yet, it has done every share in the end, and printed nothing."""
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    evaluator.main(["reference.npz", "samples.npz", *FLAGS, "--cache_dir", "cache"])
    assert capfd.readouterr() == ("", "")
    ranges = sorted(path.stem.split("-", 2)[2] for path in Path("cache").iterdir())
    assert ranges == ["0-32", "0-32", "32-50", "32-60"]


def test_a_bad_image_ends_every_process_and_only_the_first_looks_for_it_beforehand(here, capfd):
    for index, image in enumerate(np.load("samples.npz")["arr_0"]):
        save_png(f"folder/{index}.png", image)
    options = {**OPTIONS, "cache_dir": "cache"}
    launches = Launch("slurm", 1, 2, 1), Launch("slurm", 0, 2, 0)
    assist("reference.npz", "folder", launch=launches[0], **options)
    assert "checking folder" not in capfd.readouterr().err
    run("reference.npz", "folder", tell=print, launch=launches[1], **options)
    assert "checking folder" in capfd.readouterr().err
    Path("folder/7.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"SAMPLE: cannot read the image folder/7\.png"):
        assist("reference.npz", "folder", launch=launches[0], **options)


@pytest.mark.parametrize(
    ("device", "backend", "local_rank", "gpus", "expected"),
    [
        ("auto", "auto", 0, 4, "cuda:0"),
        ("auto", "torch", 3, 4, "cuda:3"),
        ("auto", "auto", 5, 4, "cuda:1"),
        ("auto", "auto", 1, 0, "auto"),
        ("auto", "tensorflow", 1, 4, "auto"),
        ("cpu", "auto", 1, 4, "cpu"),
        ("cuda:2", "torch", 1, 4, "cuda:2"),
    ],
)
def test_devices_of_ranks(monkeypatch, device, backend, local_rank, gpus, expected):
    monkeypatch.setattr(devices, "cuda_devices", lambda: gpus)
    launch = Launch("slurm", local_rank + 8, 16, local_rank)
    assert devices.device_of_rank(device, backend, launch) == expected
    assert devices.device_of_rank(device, backend, ALONE) == device


@pytest.mark.parametrize("whole", [False, True])
def test_a_share_is_let_go_when_another_process_has_stored_it(here, whole):
    """Or when another run has stored all of them, in one file."""
    images = np.load("reference.npz")["arr_0"]
    engine = choose_engine(load_graph("small.pb"), "torch")
    store = here / "whole.npz"
    shares = shares_of(len(images), 2, 8)
    seen = []

    def counting(batch):
        if len(seen) == 2:  # in the middle of the first share: the other process has done both
            there = {(0, len(images)): store} if whole else devices._paths(store, shares)
            for share, path in there.items():
                part = devices.extract(engine, source, name="", batch_size=8, share=share)
                devices.FeatureCache.save(path, part)
        seen.append(len(batch))
        return engine(batch)

    source = ArrayImages(images, flag="REF")
    expected = devices.extract(engine, source, name="", batch_size=8)
    options = {"name": "", "batch_size": 8, "keep_spatial": False}
    options.update(store=store, dimensions=expected.pool.shape[1])
    got = extract_among_ranks(counting, source, Launch("mpi", 0, 2, 0), **options)
    assert seen == [8, 8, 8]
    np.testing.assert_array_equal(got.pool, expected.pool)
