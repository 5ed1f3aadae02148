"""What the training loop costs: images a second against a plain PyTorch loop over the same model.

    python benchmarks/training_throughput.py [--threads 2] [--batch_size 32] [--blocks 8]

The plain loop does the least that trains a diffusion model: a batch that lies ready, random t and
noise, loss, backward, AdamW. The project's loop does that and all it does in a real run: shuffled
and flipped batches, draws by position, an EMA, checks for losses that are not finite, figures by
quarter of the timesteps, log files, progress; no checkpoints. Short blocks of both take turns, so
that a machine whose speed drifts slows both. On a CPU the time is the processor time of the
process, which other programs disturb least; on CUDA it is the wall clock's.
"""

import statistics
import tempfile
import time

import numpy as np
import torch

from esddpm_io.errors import run_main
from esddpm_io.help import CommandLine
from guided_diffusion import dist_util, logger
from guided_diffusion.image_datasets import ArrayImages, BatchStream
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.settings.presets import load_preset
from guided_diffusion.train_util import TrainLoop


class WithoutCheckpoints(TrainLoop):
    """The loop as it is, but for files whose cost --save_interval decides."""

    def save(self) -> None:
        pass


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--preset", default="emoji32", help="whose network is trained")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="steps of a block")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of each loop")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    dist_util.setup_dist()
    logger.configure(tempfile.mkdtemp(prefix="throughput_"), ["log", "csv"])

    preset = load_preset(args.preset)
    flags = {**model_and_diffusion_defaults(), **preset.model_flags, **preset.diffusion_flags}
    run_plain = plain_loop(flags, args.batch_size)
    run_ours = our_loop(flags, args.batch_size)
    run_plain(2)
    run_ours(2)
    images = args.steps * args.batch_size
    seconds = [
        (timed(run_plain, args.steps), timed(run_ours, args.steps)) for _ in range(args.blocks)
    ]
    plain, ours = (statistics.median(column) for column in zip(*seconds, strict=True))
    overhead = statistics.median(b / a for a, b in seconds) - 1
    print(f"device {dist_util.dev()}, {args.threads} threads, batch {args.batch_size}")
    print(f"plain PyTorch loop: {images / plain:.2f} images/s")
    print(f"training loop:      {images / ours:.2f} images/s")
    print(f"overhead:           {100 * overhead:+.1f} % (median of {args.blocks} pairs of blocks)")


def plain_loop(flags: dict, batch_size: int):
    """A function that takes n steps of the least possible loop."""
    torch.manual_seed(0)
    model, diffusion = create_model_and_diffusion(**flags)
    model.to(dist_util.dev())
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    size = flags["image_size"]
    batch = torch.rand(batch_size, 3, size, size, device=dist_util.dev()) * 2 - 1

    def run(steps: int) -> None:
        for _ in range(steps):
            t = torch.randint(0, diffusion.num_timesteps, (batch_size,), device=batch.device)
            loss = diffusion.training_losses(model, batch, t)["loss"].mean()
            opt.zero_grad()
            loss.backward()
            opt.step()

    return run


def our_loop(flags: dict, batch_size: int):
    """A function that takes n more steps of the project's loop."""
    torch.manual_seed(0)
    model, diffusion = create_model_and_diffusion(**flags)
    size = flags["image_size"]
    pixels = np.random.default_rng(0).integers(0, 256, (4000, size, size, 3), dtype=np.uint8)
    loop = WithoutCheckpoints(
        model=model,
        diffusion=diffusion,
        data=BatchStream(ArrayImages(pixels, None), batch_size, seed=0),
        batch_size=batch_size,
        microbatch=-1,
        lr=1e-4,
        ema_rate="0.9999",
        log_interval=10,
        save_interval=10**9,
        resume_checkpoint="",
        seed=0,
    )

    def run(steps: int) -> None:
        loop.iterations = loop.global_step + steps
        loop.run_loop()

    return run


def timed(run, steps: int) -> float:
    """Seconds that `steps` steps take."""
    cuda = dist_util.dev().type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    run(steps)
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    run_main(main)
