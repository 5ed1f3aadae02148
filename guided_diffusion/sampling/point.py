"""A run in a few values, for comparing it with others: `point` in metrics.json.

T' = 0 is the generator itself: its folder holds no run, but the images and `generator.json`.
"""

import dataclasses
from typing import Any

from esddpm_io.atomic import write_json
from esddpm_io.errors import UserError
from esddpm_io.files import exists, join, read_json
from esddpm_io.images import write_npz
from guided_diffusion.sampling.gathering import SAMPLES_FILE, open_start_images, t_prime
from guided_diffusion.settings.record import Run

GENERATOR_FILE = "generator.json"


def point_of_run(run: Run, seconds_per_image: float | None) -> dict[str, Any]:
    """The values of a sampling run; t_prime None: from noise."""
    return {
        "t_prime": t_prime(run) if run.start.has_images else None,
        "steps": len(run.sampler.timesteps),
        "sampler": run.sampler.name,
        "eta": run.sampler.eta,
        "clip_denoised": run.sampler.clip_denoised,
        "variance": run.sampler.variance,
        "guidance_scale": run.guidance.scale if run.guidance else 0.0,
        "seed": run.seed,
        "timesteps": list(run.sampler.timesteps),
        "network_evaluations": len(run.sampler.timesteps),
        "seconds_per_image": seconds_per_image,
        "samples": run.num_samples,
        "checkpoint": run.network.path,
        "start_images": run.start.path,
    }


@dataclasses.dataclass(frozen=True)
class GeneratorPoint:
    """The first `samples` images of a generator; contents: the hash of all of them.

    seed: None for those of a file. With one, path and contents are those of a `StartSettings` of
    kind "generator".
    """

    path: str
    contents: str
    samples: int
    seed: int | None = None

    def values(self) -> dict[str, Any]:
        """What `point_of_run` says of a run."""
        return {
            "t_prime": 0,
            "steps": 0,
            "sampler": None,
            "eta": 0.0,
            "clip_denoised": None,
            "variance": None,
            "guidance_scale": 0.0,
            "seed": self.seed,
            "timesteps": [],
            "network_evaluations": 0,
            "seconds_per_image": None,
            "samples": self.samples,
            "checkpoint": None,
            "start_images": self.path,
        }

    @property
    def identity(self) -> str:
        """Of two with the same the images are the same, as far as both have them."""
        return f"images {self.contents}" + ("" if self.seed is None else f" seed {self.seed}")

    def check_folder(self, folder: str) -> None:
        """UserError if the folder holds the images of another generator."""
        there = generator_of(folder)
        if there is not None and there.identity != self.identity:
            raise UserError(
                f"{folder} holds other images, of {there.path}: choose another --output_dir, or "
                "remove this one"
            )

    def write(self, folder: str, device: str = "") -> None:
        """Write the images as those of a run are, `samples_all.npz`, unless they are there.

        device: as in `Job`, where they are made if they are in no file.
        """
        samples = join(folder, SAMPLES_FILE)
        if generator_of(folder) == self and exists(samples):
            return
        images = open_start_images(self.path, self.samples, self.seed, device)
        write_npz(samples, images, self.samples)
        write_json(join(folder, GENERATOR_FILE), dataclasses.asdict(self))


def generator_of(folder: str) -> GeneratorPoint | None:
    """What a folder of T' = 0 holds, None if it is none."""
    content = read_json(join(folder, GENERATOR_FILE))
    return GeneratorPoint(**content) if isinstance(content, dict) else None
