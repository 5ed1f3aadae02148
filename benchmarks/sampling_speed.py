"""Images a second of the engine's sampler against a plain loop, on one device.

    python benchmarks/sampling_speed.py [--device cpu] [--rounds 3]

The plain loop does what the published suite does with guidance scale 0: coefficients stay NumPy
arrays and go to the device at each step, the classifier runs forward and backward though its
gradient is multiplied by 0, and layers keep torch's default memory format. Both run the same
networks (that of emoji32, and a small classifier; random weights) on the same start images, in
turn; each figure is the best of the rounds, by the clock and by the time of the processor, which
other work on the machine disturbs less.
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from esddpm_io.help import CommandLine
from guided_diffusion.rng import RandomStreams
from guided_diffusion.script_util import (
    classifier_defaults,
    create_classifier,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from guided_diffusion.settings.presets import load_preset

BATCH = 4
CHAIN, STEPS = "50", 10


def main() -> None:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = torch.device(args.device)
    model, diffusion, classifier = networks(device)
    size = model.image_size
    clean = torch.rand(BATCH, 3, size, size, generator=torch.manual_seed(0)) * 2 - 1
    labels = torch.zeros(BATCH, dtype=torch.long, device=device)

    def plain() -> torch.Tensor:
        return plain_loop(model, diffusion, classifier, clean.to(device), labels, STEPS)

    def engine() -> torch.Tensor:
        start = clean.to(device, memory_format=torch.channels_last)
        with torch.inference_mode():
            return diffusion.p_sample_loop(
                model,
                start.shape,
                noise=start,
                denoise_steps=STEPS,
                device=device,
                randn=RandomStreams(0, 0, BATCH).randn,
            )

    ways = {"plain loop": (plain, torch.contiguous_format), "engine": (engine, torch.channels_last)}
    figures = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, (way, memory_format) in ways.items():
            model.to(memory_format=memory_format)
            figures[name].append(timed(way, device))
    print(f"{STEPS} steps, {BATCH} images of {size} x {size}, {device}")
    print("| | images/s by the clock | images/s of processor time |\n|---|---|---|")
    for name, times in figures.items():
        clock, processor = (BATCH / min(column) for column in zip(*times, strict=True))
        print(f"| {name} | {clock:.2f} | {processor:.2f} |")


def networks(device: torch.device) -> tuple:
    preset = load_preset("emoji32")
    flags = {**model_and_diffusion_defaults(), **preset.model_flags, **preset.diffusion_flags}
    model, diffusion = create_model_and_diffusion(**{**flags, "timestep_respacing": CHAIN})
    small = {"image_size": model.image_size, "classifier_width": 32, "classifier_depth": 1}
    small["classifier_attention_resolutions"] = "8"
    classifier = create_classifier(**{**classifier_defaults(), **small})
    return model.to(device).eval(), diffusion, classifier.to(device).eval()


def timed(way: Callable[[], torch.Tensor], device: torch.device) -> tuple[float, float]:
    """Seconds by the clock and of processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    assert way().isfinite().all()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - clock, time.process_time() - processor


def plain_loop(
    model, diffusion, classifier, clean: torch.Tensor, labels: torch.Tensor, steps: int, **kwargs
) -> torch.Tensor:
    """DDPM with early stop and guidance scale 0, step by step, as the published suite goes.

    `kwargs` are the model's; without a classifier there is no gradient to be had.
    """

    def at(array: np.ndarray, t: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(array).to(t.device)[t].float()[:, None, None, None]

    def gradient(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor | float:
        if classifier is None:
            return 0.0
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            chosen = classifier(x, t).log_softmax(dim=-1).gather(1, labels[:, None]).sum()
            return torch.autograd.grad(chosen, x)[0] * 0.0

    timesteps = np.array(diffusion.timestep_map)
    t = torch.full((len(clean),), steps - 1, device=clean.device)
    x = at(diffusion.sqrt_alphas_cumprod, t) * clean
    x = x + at(diffusion.sqrt_one_minus_alphas_cumprod, t) * torch.randn_like(clean)
    for index in reversed(range(steps)):
        t = torch.full((len(clean),), index, device=clean.device)
        original = torch.from_numpy(timesteps).to(t.device)[t]
        with torch.no_grad():
            eps, share = model(x, original, **kwargs).chunk(2, dim=1)
            share = (share + 1) / 2
            log_variance = share * at(np.log(diffusion.betas), t)
            log_variance = log_variance + (1 - share) * at(
                diffusion.posterior_log_variance_clipped, t
            )
            start = at(diffusion.sqrt_recip_alphas_cumprod, t) * x
            start = (start - at(diffusion.sqrt_recipm1_alphas_cumprod, t) * eps).clamp(-1, 1)
            mean = at(diffusion.posterior_mean_coef1, t) * start
            mean = mean + at(diffusion.posterior_mean_coef2, t) * x
            mean = mean + log_variance.exp() * gradient(x, original)
            noise = torch.randn_like(x) if index else torch.zeros_like(x)
            x = mean + (0.5 * log_variance).exp() * noise
    return x


if __name__ == "__main__":
    main()
