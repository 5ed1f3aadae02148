"""How the help of all command lines is laid out."""

import argparse


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written; after a flag's help its default, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_switch = action.nargs in (0, "?")
        none = action.default in (None, "", argparse.SUPPRESS) or (is_switch and not action.default)
        if none or not action.option_strings or "default" in text:
            return text
        return f"{text} (default: %(default)s)"
