"""The parser of all command lines: how help is laid out, and what a mistyped flag is told."""

import argparse
import difflib
import re
import sys
from typing import NoReturn

from esddpm_io.errors import EXIT_USER_ERROR


class _Layout(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written; after a flag's help its default, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_switch = action.nargs in (0, "?")
        none = action.default in (None, "", argparse.SUPPRESS) or (is_switch and not action.default)
        if none or not action.option_strings or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the name that was probably meant."""

    def __init__(self, description: str | None = None, prog: str | None = None):
        super().__init__(prog=prog, description=description, formatter_class=_Layout)

    def error(self, message: str) -> NoReturn:
        print(
            f"error: {message}{self._meant(message)} (--help explains all flags)", file=sys.stderr
        )
        sys.exit(EXIT_USER_ERROR)

    def _meant(self, message: str) -> str:
        """Names like those that are wrong."""
        known = [name for action in self._actions for name in action.option_strings]
        wrong = re.findall(r"--[\w-]+", message.partition("unrecognized arguments:")[2])
        if bad_choice := re.search(r"argument (--\w+).*: invalid choice: '(.*?)'", message):
            wrong, flag = [bad_choice[2]], bad_choice[1]
            action = next(a for a in self._actions if flag in a.option_strings)
            known = [str(choice) for choice in action.choices or ()]
        near = [name for one in wrong for name in difflib.get_close_matches(one, known, n=1)]
        return f"; did you mean {', '.join(near)}?" if near else ""
