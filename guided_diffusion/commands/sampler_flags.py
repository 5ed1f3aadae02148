"""T', evaluations, sampler by name, precision: the flags that the driver and the workers share.

No torch here: the driver's --help needs none.
"""

import argparse
from collections.abc import Callable, Sequence

from guided_diffusion.settings.layers import require
from guided_diffusion.settings.record import PRECISIONS, SAMPLERS, VARIANCES
from guided_diffusion.solvers import SPACINGS

AUTO = "auto"  # the value of --t_prime that asks for a proposal
# The samplers' own share of the noise; those with eta take another, too.
OWN_ETA = {"ddpm": 1.0, "ddim": 0.0, "dpmpp_2m": 0.0, "dpmpp_2m_sde": 1.0}
WITH_ETA = ("ddim", "dpmpp_2m_sde")
COMPILE_HELP = "torch.compile the networks: a minute at the start, faster after that"
_NAMES = {"t_prime", "steps", "sampler", "spacing"}


def add_sampler_flags(add: Callable[..., object]) -> None:
    """The flags of the reverse loop that the published suite does not have."""
    t_prime = "T', the noise level to start from, in original timesteps, or auto: from data"
    add("--t_prime", type=_t_prime, metavar="T'", help=t_prime)
    add("--steps", type=int, help="K, how many times the network is evaluated")
    add("--sampler", choices=SAMPLERS, help="with --steps; ddpm if it is not given")
    add("--spacing", choices=SPACINGS, default="uniform", help="where the K evaluations lie")
    add("--eta", type=float, help="share of the noise, 0 … 1: of DDIM (0), of dpmpp_2m_sde (1)")
    variance = "of a DDPM step: the network's own or the posterior's (see docs/samplers.md)"
    add("--variance", choices=VARIANCES, default="learned", help=variance)


def _t_prime(text: str) -> int | str:
    """The argument of --t_prime; argparse names the flag if this raises ValueError."""
    return text if text == AUTO else int(text)


def add_precision_flag(add: Callable[..., object]) -> None:
    """--precision, unset unless it is typed."""
    text = "what the networks compute in; unset: what use_fp16 of the flags or the preset says"
    add("--precision", choices=PRECISIONS, help=text)


def by_name(
    args: argparse.Namespace, typed: set[str], chain: Sequence[str]
) -> dict[str, int | str | None]:
    """What these flags say, as keywords of a `Request`; empty if none was typed.

    chain: the flags of the other way to say it. UserError if both ways are mixed, or if not enough
    was said.
    """
    if not typed & _NAMES:
        return {}
    mixed = [f"--{name}" for name in chain if name in typed]
    require(
        not mixed,
        f"--t_prime, --steps, --sampler and --spacing cannot be mixed with {', '.join(mixed)}: "
        f"give either --t_prime T' --steps K or --{chain[0]} C --{chain[1]} K",
    )
    require(args.steps is not None, "--steps: say how many times the network is evaluated")
    require(
        args.start_from_scratch or args.t_prime is not None,
        "--t_prime: say the noise level to start from, in original timesteps",
    )
    require(
        not args.start_from_scratch or args.t_prime is None,
        "--t_prime: leave it out with --start_from_scratch, which starts from pure noise",
    )
    named: dict[str, int | str | None] = {"sampler": args.sampler or "ddpm"}
    return {**named, "t_prime": args.t_prime, "steps": args.steps, "spacing": args.spacing}


def unused_flags(
    args: argparse.Namespace, uses_ddim: bool, without_ddim: str
) -> dict[str, tuple[bool, str]]:
    """What does nothing in a run, and when, as `without_effect` takes it, but for classifiers.

    uses_ddim: by the published flags. without_ddim: how to have a sampler that --eta is for.
    """
    if args.start_from_scratch or not args.generator:
        unused = not args.start_from_scratch, "without --start_from_scratch or --generator"
    else:
        unused = bool(args.limit), "with --limit, which goes first"
    of_starts = ("generator", "reverse_steps", "denoise_steps", "dataset_path", "limit")
    other = uses_ddim or args.sampler not in (None, "ddpm")
    return {
        "num_samples": unused,
        **dict.fromkeys(of_starts, (args.start_from_scratch, "with --start_from_scratch")),
        "eta": (not uses_ddim and args.sampler not in WITH_ETA, f"without {without_ddim}"),
        "variance": (other, "without DDPM (--sampler ddpm)"),
    }
