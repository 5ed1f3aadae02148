"""A tiny real model, classifier, and generator images, for tests of the sampling command lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from esddpm_io.images import save_png
from guided_diffusion.commands.sample import read_jobs
from guided_diffusion.sampling.job import Job
from guided_diffusion.script_util import (
    classifier_defaults,
    create_classifier,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from tests.golden_values import fill

SCRIPTS = Path(__file__).parents[1] / "scripts"
FEATURE_GRAPH = SCRIPTS.parent / "evaluations" / "precomputed" / "emoji32_features.pb"
IMAGE_SIZE = 8
NUM_IMAGES = 10
MODEL = {
    "image_size": IMAGE_SIZE,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1",
    "attention_resolutions": "4",
    "learn_sigma": True,
    "class_cond": True,
}
CLASSIFIER = {
    "classifier_width": 32,
    "classifier_depth": 1,
    "classifier_attention_resolutions": "4",
}


class TinyFiles:
    """model.pt, classifier.pt, images.npz and the folder images/ with the same, in `root`."""

    def __init__(self, root: Path):
        self.root = root
        self.model = root / "model.pt"
        self.classifier = root / "classifier.pt"
        self.images = root / "images.npz"
        self.folder = root / "images"
        model, _ = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **MODEL})
        torch.save(fill(model).state_dict(), self.model)
        flags = {**classifier_defaults(), **CLASSIFIER, "image_size": IMAGE_SIZE}
        torch.save(fill(create_classifier(**flags)).state_dict(), self.classifier)
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (NUM_IMAGES, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        labels = rng.integers(0, 1000, NUM_IMAGES)
        np.savez(self.images, pixels, labels)
        for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            save_png(self.folder / f"{index}_label_{label}.png", image)

    def variant(self, **changes: object) -> Path:
        """A checkpoint of the network with other flags."""
        path = self.root / f"{'-'.join(changes)}.pt"
        flags = {**model_and_diffusion_defaults(), **MODEL, **changes}
        torch.save(fill(create_model_and_diffusion(**flags)[0]).state_dict(), path)
        return path

    def preset(self) -> Path:
        """A preset file for these files, scored in emoji32 features; images are the reference."""
        path = self.root / "tiny.toml"
        lines = [
            'sampler_script = "classifier_sample_diffusion_and_reverse.py"',
            'checkpoint = "model.pt"',
            'classifier = "classifier.pt"',
            'generator_images = "images.npz"',
            'reference_batch = "images.npz"',
            f'feature_graph = "{FEATURE_GRAPH}"',
            'metric_name = "Frechet distance (emoji32 features)"',
            "[model_flags]",
            *(
                f"{key} = {json.dumps(value)}"
                for key, value in MODEL.items()
                if key != "learn_sigma"
            ),
            "num_heads = 4",
            "use_new_attention_order = false",
            "[diffusion_flags]",
            "learn_sigma = true",
            'noise_schedule = "linear"',
            "[classifier_flags]",
            *(f"{key} = {json.dumps(value)}" for key, value in CLASSIFIER.items()),
        ]
        path.write_text("\n".join(lines))
        return path

    def worker_flags(self, save_dir: Path, **changes: object) -> list[str]:
        """Flags of a sampling worker: 2 of 5 steps, batches of 4 unless `changes` say otherwise."""
        flags = {
            **MODEL,
            "model_path": self.model,
            "dataset_path": self.images,
            "save_dir": save_dir,
            "timestep_respacing": "5",
            "denoise_steps": 2,
            "batch_size": 4,
            "device": "cpu",
            **changes,
        }
        return [part for key, value in flags.items() for part in (f"--{key}", str(value))]

    def guided_flags(self, save_dir: Path, **changes: object) -> list[str]:
        """The same for the guided worker."""
        extra = {**CLASSIFIER, "classifier_path": self.classifier}
        return self.worker_flags(save_dir, **{**extra, **changes})


def read_job(argv: list[str], *, guided: bool) -> Job:
    """The one job of a sampling script's command line."""
    [job] = read_jobs(argv, guided=guided)
    return job


def run_script(name: str, *argv: object, **options) -> subprocess.CompletedProcess:
    """Run scripts/NAME as a user does, on one thread, and return what it printed."""
    return subprocess.run(
        [sys.executable, str(SCRIPTS / name), *map(str, argv)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def chunks(save_dir: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """All finished samples of a folder, images and labels, in order."""
    files = [np.load(path) for path in sorted((save_dir / "chunks").glob("*/[0-9]*.npz"))]
    images = np.concatenate([file["arr_0"] for file in files])
    labelled = "arr_1" in files[0].files
    return images, np.concatenate([file["arr_1"] for file in files]) if labelled else None
