"""A record of samples from noise, for tests that fill folders by hand."""

import dataclasses

from guided_diffusion.script_util import diffusion_defaults, model_and_diffusion_defaults
from guided_diffusion.settings.record import Network, Run, SamplerSettings, StartSettings


def plain_run(num_samples: int, **changes: object) -> Run:
    """Samples of 8 × 8 pixels in two DDPM steps; `changes` are fields of the record."""
    flags = {**model_and_diffusion_defaults(), "image_size": 8}
    process = {k: v for k, v in diffusion_defaults().items() if k != "timestep_respacing"}
    run = Run(
        network=Network("model", flags, "model.pt", "0" * 64),
        process=process,
        guidance=None,
        start=StartSettings("noise"),
        sampler=SamplerSettings("ddpm", "2", None, (999, 0), 1.0, True),
        seed=0,
        num_samples=num_samples,
    )
    return dataclasses.replace(run, **changes)
