"""How much of the time of sampling goes into what is not the network.

    python benchmarks/loop_share.py [--batch_size 32] [--steps 8]

Samples emoji32 images with the engine (the shipped network and VAE images, T' = 500) on one thread
of the CPU, and prints the processor's seconds an image in all, in the network, and the share of the
rest: reading images, noise, the arithmetic of the steps, pixels. Processor time, because other work
on the machine disturbs it less.
"""

import time

import torch

from esddpm_io.help import CommandLine
from guided_diffusion.commands.sample import read_jobs
from guided_diffusion.sampling.sampler import Sampler
from guided_diffusion.settings.presets import load_preset
from guided_diffusion.unet import UNetModel


def main() -> None:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="network evaluations an image")
    parser.add_argument("--rounds", type=int, default=3, help="the best one counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| sampler | s an image | of it in the network | share of the loop |\n|---|---|---|---|")
    for name in ("ddpm", "dpmpp_2m_sde"):
        sampler = make_sampler(name, args.batch_size, args.steps)
        rounds = [timed(sampler, args.batch_size) for _ in range(args.rounds + 1)][1:]
        whole, network = min(rounds, key=lambda times: times[0])
        share = (whole - network) / whole
        whole, network = whole / args.batch_size, network / args.batch_size
        print(f"| {name} | {whole:.4f} | {network:.4f} | {100 * share:.1f} % |", flush=True)


def make_sampler(name: str, batch_size: int, steps: int) -> Sampler:
    preset = load_preset("emoji32")
    flags = {
        "model_path": preset.checkpoint,
        "dataset_path": preset.generator_images,
        "save_dir": "benchmarks/results/loop_share",
        "batch_size": batch_size,
        "device": "cpu",
        "t_prime": 500,
        "steps": steps,
        "sampler": name,
    }
    argv = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    return Sampler(read_jobs(argv, guided=False)[0])


def timed(sampler: Sampler, batch_size: int) -> tuple[float, float]:
    """Processor seconds of one batch, and those of them inside the network."""
    inside, began = 0.0, 0.0

    def before(module: torch.nn.Module, _inputs: object) -> None:
        nonlocal began
        if isinstance(module, UNetModel):
            began = time.process_time()

    def after(module: torch.nn.Module, _inputs: object, _output: object) -> None:
        nonlocal inside
        if isinstance(module, UNetModel):
            inside += time.process_time() - began

    hooks = [
        torch.nn.modules.module.register_module_forward_pre_hook(before),
        torch.nn.modules.module.register_module_forward_hook(after),
    ]
    start = time.process_time()
    sampler.sample(0, batch_size)
    whole = time.process_time() - start
    for hook in hooks:
        hook.remove()
    return whole, inside


if __name__ == "__main__":
    main()
