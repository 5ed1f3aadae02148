"""Peak memory of a sampling worker and of gathering, at 2,000 and at 50,000 images of 256 × 256.

    python benchmarks/sampling_memory.py [--images 2000 50000] [--inputs stored compressed pngs]

Each figure is the largest resident set of one process of its own (ru_maxrss). The worker opens the
whole input and samples its last images with a small network (the network's own memory does not
depend on the input); gathering joins all chunks into samples_all.npz. At 50,000 images this takes
about 20 GB of disk, which is given back.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from esddpm_io.help import CommandLine
from esddpm_io.images import save_png
from esddpm_io.npz import NpzWriter
from guided_diffusion.sampling.chunks import ChunkFolder
from guided_diffusion.script_util import diffusion_defaults, model_and_diffusion_defaults
from guided_diffusion.settings.record import Network, Run, SamplerSettings, StartSettings

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SIZE = 256
BATCH = 2  # images that the measured worker samples
CHUNK = 16  # images in a chunk that is gathered; divides the numbers of images
WORKER = "image_sample_diffusion_and_reverse.py"
GATHER = "gather_numpyz_and_compute_fid.py"
MODEL = {
    "image_size": SIZE,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1,1,1,1,1",  # down to 8 × 8, where the attention is
    "attention_resolutions": "",
    "class_cond": False,
}


def main() -> None:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[2000, 50000])
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--folder", help="where the inputs are made; default: a temporary folder")
    args = parser.parse_args()
    columns = ["images", *(f"worker, {name}" for name in args.inputs), "gather"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        checkpoint = make_checkpoint(Path(scratch))
        for number in args.images:
            root = Path(scratch) / str(number)
            root.mkdir()
            peaks = []
            for name in args.inputs:
                images = INPUTS[name](root / name, number)
                peaks.append(worker_peak(root / f"out_{name}", checkpoint, images, number))
            peaks.append(gather_peak(root / "gathered", number))
            figures = " | ".join(f"{peak / 1e6:.0f} MB" for peak in peaks)
            print(f"| {number} | {figures} |", flush=True)
            shutil.rmtree(root)


def make_checkpoint(folder: Path) -> Path:
    import torch

    from guided_diffusion.script_util import (
        create_model_and_diffusion,
        model_and_diffusion_defaults,
    )

    model, _ = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **MODEL})
    torch.save(model.state_dict(), folder / "model.pt")
    return folder / "model.pt"


def make_stored(path: Path, number: int) -> Path:
    """An npz of black images, stored."""
    layout = {"arr_0": ((number, SIZE, SIZE, 3), np.uint8)}
    with NpzWriter(path.with_suffix(".npz"), layout) as writer:
        for block in black_blocks(number):
            writer.append("arr_0", block)
    return path.with_suffix(".npz")


def make_compressed(path: Path, number: int) -> Path:
    """An npz of black images, compressed."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (number, SIZE, SIZE, 3)}
    with (
        zipfile.ZipFile(
            path.with_suffix(".npz"), "w", zipfile.ZIP_DEFLATED, compresslevel=1
        ) as out,
        out.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for block in black_blocks(number):
            member.write(block.data)
    return path.with_suffix(".npz")


def black_blocks(number: int) -> Iterator[np.ndarray]:
    """`number` black images, as many at a time as a chunk has."""
    for start in range(0, number, CHUNK):
        yield np.zeros((min(CHUNK, number - start), SIZE, SIZE, 3), np.uint8)


def make_folder(path: Path, number: int) -> Path:
    """A folder of `number` names for one PNG."""
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    save_png(path / "0_label_0.png", noise)
    for index in range(1, number):
        os.link(path / "0_label_0.png", path / f"{index}_label_{index % 1000}.png")
    return path


INPUTS = {"stored": make_stored, "compressed": make_compressed, "pngs": make_folder}


def worker_peak(out: Path, checkpoint: Path, images: Path, number: int) -> int:
    """Peak bytes of the last of many workers, which has the way through all of the input."""
    flags = {
        **MODEL,
        "model_path": checkpoint,
        "dataset_path": images,
        "timestep_respacing": "1",
        "denoise_steps": 1,
        "batch_size": BATCH,
        "chunk_size": BATCH,
        "save_dir": out,
        "device": "cpu",
        "global_rank": number // BATCH - 1,
        "world_size": number // BATCH,
    }
    words = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    return peak_of([sys.executable, str(SCRIPTS / WORKER), *words])


def record_of(number: int) -> Run:
    """What a folder with `number` samples of noise says of them."""
    network = Network("model", {**model_and_diffusion_defaults(), "image_size": SIZE}, "m.pt", "")
    sampler = SamplerSettings("ddpm", "1", None, (0,), 1.0, True)
    process = {k: v for k, v in diffusion_defaults().items() if k != "timestep_respacing"}
    return Run(network, process, None, StartSettings("noise"), sampler, 0, number)


def gather_peak(out: Path, number: int) -> int:
    """Peak bytes of gathering `number` samples out of chunks that are links to one of them."""
    folder = ChunkFolder.open(out, record_of(number))
    noise = np.random.default_rng(0).integers(0, 256, (CHUNK, SIZE, SIZE, 3), dtype=np.uint8)
    folder.write((0, CHUNK), noise, np.zeros(CHUNK, np.int64))
    [first] = (out / "chunks").glob("*/*")
    for start, stop in folder.missing(CHUNK):
        os.link(first, first.with_name(f"{start:07}-{stop:07}.npz"))
    argv = [sys.executable, str(SCRIPTS / GATHER), "--dir", str(out), "--not_eval_metrics"]
    return peak_of(argv)


# A process starts out with the peak of the one that it was split off from, so the measured command
# is started by a small one.
_MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)  # Linux counts in KiB
sys.exit(code)
"""


def peak_of(argv: list[str]) -> int:
    """Run a command to its end; its largest resident set in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *argv],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        sys.exit(f"{' '.join(argv)} ended with exit code {done.returncode}")
    return int(done.stdout)


if __name__ == "__main__":
    main()
