"""Values in layers, each value with where it came from; and what the user typed, in one parse."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence

from esddpm_io.errors import UserError, check_known, of_type


@dataclasses.dataclass(frozen=True)
class Layer:
    """Values of one source; `origin` names it in messages ("preset emoji32", "typed")."""

    origin: str
    values: Mapping[str, object]


def resolve(layers: Sequence[Layer]) -> tuple[dict[str, object], dict[str, str]]:
    """The values of all layers, a later one winning, and the origin of each."""
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        values |= layer.values
        origins |= dict.fromkeys(layer.values, layer.origin)
    return values, origins


@dataclasses.dataclass(frozen=True)
class _Default:
    value: object


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, set[str]]:
    """Parse a command line once: all values, and the names of the flags that were typed."""
    # argparse leaves alone what is there already, so a marked default shows what nobody typed.
    defaults = {
        action.dest: _Default(action.default)
        for action in parser._actions
        if action.default is not argparse.SUPPRESS and action.option_strings
    }
    given = vars(parser.parse_args(argv, argparse.Namespace(**defaults)))
    typed = {name for name, value in given.items() if not isinstance(value, _Default)}
    values = {n: v.value if isinstance(v, _Default) else v for n, v in given.items()}
    return argparse.Namespace(**values), typed


def check_not_empty(
    args: argparse.Namespace, typed: set[str], may_be_empty: Sequence[str] = ()
) -> None:
    """UserError for typed text without a letter, as a shell makes of a variable that is not set."""
    for name in sorted(typed.difference(may_be_empty)):
        require(getattr(args, name) != "", f"--{name} is empty: give a value, or leave it out")


def check_flags(where: str, flags: Mapping[str, object], known: Mapping[str, object]) -> None:
    """UserError unless all flags are among the known ones and of their defaults' types.

    where: what the message begins with. A whole number is a fine float, but a truth value is no
    number.
    """
    check_known(f"{where}: unknown flag", flags, known)
    for name, value in flags.items():
        of_type(f"{where}: {name}", value, type(known[name]))


def without_effect(typed: set[str], conditions: Mapping[str, tuple[bool, str]]) -> list[str]:
    """A remark for each typed flag that does nothing; `conditions`: whether it does, and when."""
    return [
        f"--{name} has no effect {when}"
        for name, (useless, when) in conditions.items()
        if useless and name in typed
    ]


def require(condition: bool, message: str) -> None:
    """UserError with `message` unless the condition holds."""
    if not condition:
        raise UserError(message)
