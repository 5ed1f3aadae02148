"""Which flags build a network: its levels, from the texts and sizes given, and what cannot be.

Errors are ValueErrors that begin with the name of the flag at fault, for library users and the
command lines alike.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .nn import NORM_GROUPS


@dataclass(frozen=True)
class Levels:
    """The levels of a network, finest first.

    mult: multipliers of the base width. attention_factors: downsampling factors (1 = full size)
    of the sizes that get attention. attended: channels of the levels with attention and of the
    middle block, which always has it.
    """

    mult: tuple[float, ...]
    attention_factors: tuple[int, ...]
    attended: tuple[int, ...]


def plan_levels(
    *,
    size: tuple[str, int],
    width: tuple[str, int],
    attention: tuple[str, str],
    table: Mapping[int, tuple[float, ...]],
    channel_mult: str | None = None,
) -> Levels:
    """The levels for (flag, value) of image size, base width and sizes with attention.

    The multipliers are those in `channel_mult`, or, where it is empty or (None) no flag of the
    network, those of the size in `table`. ValueError for levels that cannot be normalised or
    halved evenly; a warning if no level has one of the sizes that should get attention.
    """
    mult = _parse_mult(channel_mult) if channel_mult else _mult_of_size(size, table, channel_mult)
    widths = [int(part * width[1]) for part in mult]
    if any(channels < NORM_GROUPS or channels % NORM_GROUPS for channels in widths):
        raise ValueError(
            f"{width[0]} {width[1]} times {_listed(mult)} gives widths {_listed(widths)}: each"
            f" level's must be a multiple of {NORM_GROUPS}"
        )
    halved = 2 ** (len(mult) - 1)
    if size[1] < 1 or size[1] % halved:
        raise ValueError(
            f"{size[0]} {size[1]} must be a multiple of {halved}: {len(mult)} levels, of widths"
            f" {_listed(widths)}, halve the images {len(mult) - 1} times"
        )
    factors = _attention_factors(size[1], *attention)
    attended = [channels for level, channels in enumerate(widths) if 2**level in factors]
    if attention[1] and not attended:
        sizes = [size[1] // 2**level for level in range(len(mult))]
        warnings.warn(
            f"{attention[0]} {attention[1]}: the levels' sizes are {_listed(sizes)}, so that only"
            " the middle block has attention",
            stacklevel=3,
        )
    return Levels(mult, factors, (*attended, widths[-1]))


def check_unet(
    levels: Levels,
    *,
    num_res_blocks: int,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    dropout: float,
) -> None:
    """ValueError for numbers that no U-Net of these levels can have."""
    if num_res_blocks < 1:
        raise ValueError(f"num_res_blocks is {num_res_blocks}, it must be at least 1")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout is {dropout}, it must be in [0, 1]")
    if num_head_channels != -1:  # it decides, and num_heads is not read
        heads = {"num_head_channels": num_head_channels}
    elif num_heads_upsample != -1:
        heads = {"num_heads": num_heads, "num_heads_upsample": num_heads_upsample}
    else:
        heads = {"num_heads": num_heads}
    for name, value in heads.items():
        if value < 1 or any(channels % value for channels in levels.attended):
            unset = "" if name == "num_heads" else " (or be -1 to follow num_heads)"
            raise ValueError(
                f"{name} {value} must be at least 1 and divide the channels of attention,"
                f" {_listed(sorted(set(levels.attended)))}{unset}"
            )


def check_classifier(
    levels: Levels, *, width: int, depth: int, head_channels: int, pool: str, pools: Sequence[str]
) -> None:
    """The same for a classifier, whose attention heads have `head_channels` channels."""
    if depth < 1:
        raise ValueError(f"classifier_depth is {depth}, it must be at least 1")
    if any(channels % head_channels for channels in levels.attended):
        raise ValueError(
            f"classifier_width {width} makes attention of {_listed(sorted(set(levels.attended)))}"
            f" channels, which must be multiples of {head_channels}"
        )
    if pool not in pools:
        raise ValueError(f'classifier_pool must be one of {", ".join(pools)}, not "{pool}"')


def _parse_mult(text: str) -> tuple[float, ...]:
    try:
        mult = tuple(float(part) for part in text.split(","))
    except ValueError:
        mult = ()
    if not mult or not all(0 < part < math.inf for part in mult):
        raise ValueError(
            f'channel_mult must be a comma list of numbers above 0 such as "1,2,2", not "{text}"'
        )
    return mult


def _mult_of_size(
    size: tuple[str, int], table: Mapping[int, tuple[float, ...]], channel_mult: str | None
) -> tuple[float, ...]:
    if size[1] not in table:
        or_else = "" if channel_mult is None else ", or give channel_mult"
        raise ValueError(
            f"{size[0]} {size[1]} has no default widths: choose one of"
            f" {_listed(sorted(table))}{or_else}"
        )
    return table[size[1]]


def _attention_factors(size: int, flag: str, text: str) -> tuple[int, ...]:
    """Downsampling factors of the image sizes in a comma list such as "16,8"."""
    try:
        return tuple(size // int(part) for part in text.split(",") if part)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f'{flag} must be a comma list of image sizes, not "{text}"') from None


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
