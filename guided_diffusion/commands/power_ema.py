"""Make an average of weights of any width, from a run that was trained with --power_ema.

    python scripts/power_ema.py FOLDER --sigma_rel 0.15 [--step N]

FOLDER has the ema_powerWIDTH_NNNNNN.pt of the run, the more the better. Writes
posthoc_0.15_NNNNNN.pt with its sidecar there, which sampling takes as any other network.
"""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from esddpm_io.errors import UserError, terminate_cleanly
from esddpm_io.help import CommandLine
from guided_diffusion.power_ema import Profile, gamma_of, mixture

if TYPE_CHECKING:
    import torch

_SAVED = re.compile(r"ema_power([\d.e-]+)_(\d{6,})\.pt")


def create_argparser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandLine(description=__doc__)
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="the OPENAI_LOGDIR of the training")
    add("--sigma_rel", type=float, required=True, help="width, as a share of the run: 0.03 … 0.2")
    add("--step", type=int, default=0, help="the run's length; 0: up to its newest average")
    return parser


def main(argv: list[str] | None = None) -> None:
    terminate_cleanly()
    args = create_argparser().parse_args(argv)

    from guided_diffusion.checkpoints import read_sidecar, save_checkpoint, write_sidecar

    try:
        gamma = gamma_of(args.sigma_rel)
    except ValueError as error:
        raise UserError(str(error).replace("power_ema", "--sigma_rel")) from error
    files = saved_averages(args.folder)
    last = args.step or max(profile.step for profile in files.values())
    files = {path: profile for path, profile in files.items() if profile.step <= last}
    if last not in {profile.step for profile in files.values()}:
        raise UserError(f"--step {last}: {args.folder} has no averages of this step")
    factors = mixture(list(files.values()), Profile(last, gamma))
    path = str(args.folder / f"posthoc_{args.sigma_rel}_{last:06d}.pt")
    newest = str(max(files, key=lambda file: files[file].step))
    sidecar = read_sidecar(newest)
    if sidecar:
        write_sidecar(path, **sidecar)
    save_checkpoint(added_up(dict(zip(map(str, files), factors, strict=True)), newest), path)
    print(f"{path}, of {len(files)} averages")


def saved_averages(folder: Path) -> dict[Path, Profile]:
    """The files of power-function averages in a folder; UserError if there are none."""
    found = {}
    for path in sorted(folder.glob("ema_power*.pt")):
        if match := _SAVED.fullmatch(path.name):
            found[path] = Profile(int(match[2]), gamma_of(float(match[1])))
    if not found:
        raise UserError(f"{folder} has no ema_powerWIDTH_NNNNNN.pt: train with --power_ema")
    return found


def added_up(factors: dict[str, float], newest: str) -> "dict[str, torch.Tensor]":
    """The sum of the files' weights times their factors; whole numbers are those of `newest`."""
    from guided_diffusion.checkpoints import read_checkpoint

    total: dict[str, torch.Tensor] = {}
    for path, factor in factors.items():
        for name, value in read_checkpoint(path, flag="FOLDER").items():
            if value.is_floating_point():
                total[name] = total.get(name, 0) + factor * value.double()
            elif path == newest:
                total[name] = value
    return {n: v.float() if v.is_floating_point() else v for n, v in total.items()}
