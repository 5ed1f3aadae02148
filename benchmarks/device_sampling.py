"""The published suite's way of sampling against ours with each option, on the device at hand.

    python benchmarks/device_sampling.py --device 0
    OMP_NUM_THREADS=1 python benchmarks/device_sampling.py --device cpu \\
        --networks imagenet64 --batch_sizes 2 --steps 2 --rounds 1

The published way: float16 by `convert_to_fp16` (on CUDA), coefficients stay NumPy arrays and go to
the device at each step, the classifier runs though its gradient is multiplied by 0, layers and
images in NCHW memory. It gets our layers, hence also our attention. Networks are those of the
presets with random weights, emoji32's with its own. Every row is a process of its own, which draws
the same images from the same noise (the published way draws its own on the device); the first
round is not counted, of the others the best one is. Images a second are by the clock on CUDA, and
of processor time on a CPU. Errors are against our float32, in levels of 255.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import resource
import tempfile
from pathlib import Path

import torch
from sampling_speed import plain_loop, timed

from esddpm_io.help import CommandLine
from guided_diffusion.checkpoints import load_weights
from guided_diffusion.compiling import compile_for_sampling
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.rng import DrawnAhead, RandomStreams
from guided_diffusion.sampling.sampler import (
    choose_device,
    dtype_on,
    is_out_of_memory,
    name_of,
    place,
    set_tf32,
)
from guided_diffusion.script_util import create_network, diffusion_defaults
from guided_diffusion.settings.presets import Preset, load_preset
from guided_diffusion.settings.record import PRECISIONS, diffusion_from
from guided_diffusion.solvers import evaluation_timesteps

T_PRIME = 500
PUBLISHED = "published way"
REFERENCE = "float32"


@dataclasses.dataclass(frozen=True)
class Way:
    """A row: what is computed in ("" for the published way), memory layout, compiled or not."""

    precision: str
    channels_last: bool = True
    compiled: bool = False

    @property
    def name(self) -> str:
        if not self.precision:
            return PUBLISHED
        layout = "" if self.channels_last else ", NCHW memory"
        return f"{self.precision}{layout}{', --compile' if self.compiled else ''}"


@dataclasses.dataclass(frozen=True)
class Case:
    """What one process measures; `images` is the file for its images."""

    network: str
    batch_size: int
    steps: int
    rounds: int
    device: str
    way: Way
    images: Path


def main() -> None:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--device", default="", help="cpu, or the index of a GPU (default: 0)")
    parser.add_argument("--networks", default="imagenet64,lsun_cat", help="presets")
    parser.add_argument("--batch_sizes", default="32,100")
    parser.add_argument("--steps", type=int, default=25, help=f"from T' = {T_PRIME}")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = choose_device(args.device)
    print(f"{name_of(device)}, torch {torch.__version__}, {args.steps} steps an image\n")
    print("| network | batch | way | images/s | ratio | peak memory, MiB | mean error | largest |")
    print("|---|---|---|---|---|---|---|---|")
    for network in args.networks.split(","):
        for batch_size in map(int, args.batch_sizes.split(",")):
            measure_all(network, batch_size, args, device)


def measure_all(
    network: str, batch_size: int, args: argparse.Namespace, device: torch.device
) -> None:
    """The rows of one network and batch size, a process each."""
    baseline: float | None = None
    with tempfile.TemporaryDirectory() as folder:
        for way in ways(device):
            images = Path(folder) / f"{way.name}.pt"
            case = Case(network, batch_size, args.steps, args.rounds, str(device), way, images)
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                found = pool.submit(measure, case).result()
            begin = f"| {network} | {batch_size} | {way.name} |"
            if found is None:
                print(f"{begin} out of memory | | | | |", flush=True)
                continue
            rate, memory = found
            baseline = rate if way.name == PUBLISHED else baseline
            ratio = f"{rate / baseline:.2f}" if baseline else ""
            errors = (
                errors_of(images, Path(folder) / f"{REFERENCE}.pt") if way.precision else "| | |"
            )
            print(f"{begin} {rate:.3g} | {ratio} | {memory:.0f} {errors}", flush=True)


def ways(device: torch.device) -> list[Way]:
    """The published way, and ours: float32 first, to which the others are compared."""
    precisions = [*PRECISIONS]
    if device.type == "cpu":  # which has neither of these: they are other rows again
        precisions = ["float32", "bfloat16"]
    return [
        Way("", channels_last=False),
        *(Way(precision) for precision in precisions),
        Way("float32", channels_last=False),
        *(Way(precision, compiled=True) for precision in precisions),
    ]


def errors_of(images: Path, reference: Path) -> str:
    if not reference.exists():
        return "| | |"
    difference = (torch.load(images) - torch.load(reference)).abs() * 127.5
    return f"| {difference.mean():.3f} | {difference.max():.1f} |"


def measure(case: Case) -> tuple[float, float] | None:
    """Images a second and peak memory in MiB; None if there is not enough memory."""
    device, way = choose_device(case.device), case.way
    preset = load_preset(case.network)
    model = network_of(preset, "model")
    size = model.image_size
    clean = torch.rand(case.batch_size, 3, size, size, generator=torch.manual_seed(1)) * 2 - 1
    labels = torch.arange(case.batch_size, device=device) % 1000
    kwargs = {"y": labels} if preset.model_flags["class_cond"] else {}
    try:
        loop = ours if way.precision else published
        sample = loop(case, preset, model, clean.to(device), labels, kwargs)
        rounds = [timed(sample, device) for _ in range(case.rounds + 1)][1:]
        torch.save(sample().float().cpu(), case.images)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    clock = 0 if device.type == "cuda" else 1
    rate = case.batch_size / min(times[clock] for times in rounds)
    if device.type == "cuda":
        return rate, torch.cuda.max_memory_allocated(device) / 2**20
    return rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def published(case: Case, preset: Preset, model, clean, labels, kwargs):
    """The loop of `sampling_speed`, in float16 on CUDA."""
    diffusion = process_of(preset, case.steps)
    networks = [model, network_of(preset, "classifier") if preset.is_guided else None]
    for network in networks:
        if network is not None:
            network.to(clean.device).eval()
            if clean.device.type == "cuda":
                network.convert_to_fp16()
    return lambda: plain_loop(
        model, diffusion, networks[1], clean, labels, case.steps, **kwargs
    ).clamp(-1, 1)


def ours(case: Case, preset: Preset, model, clean, labels, kwargs):
    """What the engine does at guidance scale 0, whose classifier it leaves out."""
    device, way = clean.device, case.way
    diffusion = process_of(preset, case.steps)
    layout = torch.channels_last if way.channels_last else torch.contiguous_format
    if device.type == "cuda" and way.precision in ("float32", "tf32"):
        set_tf32(way.precision == "tf32")
    model = place(model, device, dtype_on(device, way.precision)).to(memory_format=layout)
    if way.compiled:
        model = compile_for_sampling(model, case.batch_size, device)
    start = clean.contiguous(memory_format=layout)

    def sample() -> torch.Tensor:
        streams = RandomStreams(0, 0, case.batch_size)
        ahead = DrawnAhead(streams, case.steps + 1) if device.type == "cuda" else None
        with torch.inference_mode():
            return diffusion.p_sample_loop(
                model,
                start.shape,
                noise=start,
                denoise_steps=diffusion.num_timesteps,
                model_kwargs=kwargs,
                device=device,
                randn=(ahead or streams).randn,
            )

    return sample


def network_of(preset: Preset, kind: str):
    """A network of a preset: emoji32's own, or one with random weights in all layers."""
    flags = preset.model_flags if kind == "model" else preset.classifier_flags
    torch.manual_seed(0)
    size = preset.model_flags["image_size"]
    network = create_network(kind, {**preset.diffusion_flags, **flags, "image_size": size})
    if preset.name == "emoji32":
        load_weights(network, preset.checkpoint, flag="--networks")
        return network
    for parameter in network.parameters():
        if not parameter.any():  # layers that training starts from as zeros
            torch.nn.init.normal_(parameter, std=0.02)
    return network


def process_of(preset: Preset, steps: int) -> SpacedDiffusion:
    """The steps from T' on, uniform in t, as a process of its own."""
    flags = {**diffusion_defaults(), **preset.diffusion_flags}
    known = {name: flags[name] for name in diffusion_defaults()}
    whole = diffusion_from(known, "")
    return whole.keeping(evaluation_timesteps(whole.alphas_cumprod, T_PRIME, steps))


if __name__ == "__main__":
    main()
