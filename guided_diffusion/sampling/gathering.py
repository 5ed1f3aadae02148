"""Finished samples into one file and a grid to look at."""

import os
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

from esddpm_io.files import absolute, join, read_json, remove
from esddpm_io.images import ImageSource, noted_fingerprint, open_images
from guided_diffusion.sampling import outputs
from guided_diffusion.sampling.chunks import IMAGES_FILE, ChunkFolder
from guided_diffusion.sampling.heartbeat import Observer
from guided_diffusion.settings.record import Run, diffusion_of

SAMPLES_FILE, GRID_FILE = "samples_all.npz", "samples_grid.png"
METRICS_FILE = "metrics.json"


def gather(folder: ChunkFolder, log: Callable[[str], None] = print) -> bool:
    """Join all samples into `samples_all.npz` and draw `samples_grid.png`.

    False, and a line for each, if chunks were found damaged: they are missing now.
    """
    if folder.remove_damaged(log, all_bytes=True):
        return False
    samples, metrics = (join(folder.folder, name) for name in (SAMPLES_FILE, METRICS_FILE))
    scored = read_json(metrics)
    point = scored.get("point") if isinstance(scored, dict) else None
    if point and point["samples"] != folder.num_samples:
        log(f"{metrics} is removed: it is of another number of samples")
        remove(metrics)
    outputs.join_parts(outputs.parts_of(folder, 0, folder.num_samples), samples)
    start, starts = folder.run.start, None
    if start.has_images and start.path is not None:
        seed = folder.run.seed if start.kind == "generator" else None
        starts = open_start_images(start.path, folder.num_samples, seed)
        note = join(folder.folder, IMAGES_FILE)
        if seed is None and noted_fingerprint(starts, note) != start.contents:
            log(f"{start.path} has changed since it was sampled from: the grid leaves it out")
            starts = None
    draw_grid(folder.folder, starts, _caption(folder.run))
    Observer(folder.folder).close()
    folder.clean()
    return True


def open_start_images(path: str, count: int, seed: int | None, device: str = "") -> ImageSource:
    """The images of a file or folder, or, with a seed, `count` that a generator makes.

    path: of them, or the generator's target; device: as in `Job`, where the generator works.
    """
    if seed is None:
        return open_images(path, flag="--dataset_path")
    # Bring torch, which gathering does without.
    from guided_diffusion.sampling.generators import GeneratedImages, load_generator
    from guided_diffusion.sampling.sampler import choose_device

    return GeneratedImages(load_generator(path, choose_device(device)), count, seed)


def draw_grid(folder: str, starts: ImageSource | None, caption: str = "") -> None:
    """Draw the samples of a folder that are gathered, and say where both are."""
    samples, grid = join(folder, SAMPLES_FILE), join(folder, GRID_FILE)
    outputs.save_grid(samples, starts, grid, caption)
    print(f"samples: {absolute(samples)}\ngrid: {absolute(grid)}", flush=True)


def how_sampled(folder: ChunkFolder) -> dict[str, Any]:
    """What the making of the samples took, told by the finished chunks themselves."""
    made = folder.about()
    timesteps = folder.run.sampler.timesteps
    seconds = sum(record["seconds"] for record in made)
    return {
        "images": folder.num_samples,
        "t_prime": t_prime(folder.run),
        "start_timestep": timesteps[0],
        "timesteps": timesteps,
        "network_evaluations_per_image": len(timesteps),
        "seconds_per_image": seconds / folder.num_samples,
        "device_seconds": seconds,
        "devices": dict(Counter(record["device"] for record in made)),
        "hosts": sorted({record["host"] for record in made}),
        "processes": len({record["worker"] for record in made}),
        "batch_size": statistics.mode(record["batch_size"] for record in made),
        "chunk_size": max(stop - start for start, stop in folder.finished()),
    }


def t_prime(run: Run) -> int:
    """T', in original timesteps; of the published pair of chain length C and steps K, T K / C.

    That chain's step K, which sampling starts at, lies a little below it.
    """
    if run.sampler.respacing is None:
        return run.sampler.timesteps[0] + 1
    process = diffusion_of(run)
    return round(process.original_num_steps * len(run.sampler.timesteps) / process.num_timesteps)


def _caption(run: Run) -> str:
    """Data set, sampler, where it starts, number of evaluations and seed, in a line."""
    timesteps = run.sampler.timesteps
    # Of the published pair T' is a rounded number, which it takes the whole chain to know.
    start = f"T' = {t_prime(run)}" if run.sampler.respacing is None else f"t = {timesteps[0]}"
    words = [
        os.path.splitext(os.path.basename(run.preset or ""))[0],
        run.sampler.name,
        start if run.start.has_images else "from noise",
        f"K = {len(timesteps)}",
        f"seed {run.seed}",
    ]
    return ", ".join(word for word in words if word)
