"""One line for the user instead of a traceback."""

import errno
import signal
import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2
EXIT_DISK_FULL = 74  # sysexits.h: an error of input or output
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_TERMINATED = 143  # 128 + SIGTERM


class UserError(ValueError):
    """Something the user can put right: the message is one line that names the flag or the file."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C is; `terminate_cleanly` has it raised."""


def terminate_cleanly() -> None:
    """From now on SIGTERM raises `Terminated`, so that `finally` blocks run."""

    def handle(signum: int, frame: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, handle)


def check_at_least(args: object, lowest: dict[str, int]) -> None:
    """UserError for the first flag of parsed `args` whose value is below its lowest one."""
    for name, least in lowest.items():
        value = getattr(args, name, least)
        if value < least:
            raise UserError(f"--{name} is {value}, it must be at least {least}")


def describe_os_error(error: OSError) -> str | None:
    """One line for a full disk or a spent quota, None for any other error."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    where = f" while writing {error.filename}" if error.filename else ""
    return f"the disk is full{where}: free some space and start the same command again"


def run_main(main: Callable[[], object]) -> None:
    """Run a script's `main`, turning what the user can mend into one line and an exit code.

    `UserError` ends in exit code 2, Ctrl-C in 130, `Terminated` in 143, a full disk in 74; any
    other exception is a fault of the program and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except Terminated:
        print("terminated", file=sys.stderr)
        sys.exit(EXIT_TERMINATED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        message = describe_os_error(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_DISK_FULL)
