"""One line for the user instead of a traceback."""

import contextlib
import difflib
import errno
import os
import re
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

EXIT_MAY_PASS = 1  # something that another try may mend, as any fault of the program is
EXIT_USER_ERROR = 2
EXIT_DISK_FULL = 74  # sysexits.h: an error of input or output
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
EXIT_TERMINATED = 143  # 128 + SIGTERM

_SWALLOWED_S = 1.0  # between two looks whether `Terminated` is still on its way
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_PEER_ENDED = {  # by what PyTorch says of it
    "gloo/transport": (
        "another process of this run has ended, and with it this one: see its own message"
    ),
    "DataLoader worker": (
        "a process that reads images was killed, as happens where memory is short: fewer "
        "--num_workers take less, --resume_checkpoint auto goes on"
    ),
}
_MAY_PASS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY)


class UserError(ValueError):
    """Something the user can put right: the message is one line that names the flag or the file.

    got, valid: names that are none of the valid ones; the message ends with what may be meant.
    """

    def __init__(
        self, message: str, *, got: str | Iterable[str] = (), valid: Iterable[str] = ()
    ) -> None:
        super().__init__(message + did_you_mean(got, valid))


@contextlib.contextmanager
def speaking_of_arguments(**names: str) -> Iterator[None]:
    """For library calls: a UserError of the block speaks of arguments, not of flags.

    names: what the command line calls otherwise, as REF="reference".
    """
    try:
        yield
    except UserError as error:
        # Not where they are parts of a path
        text = re.sub(r"(?<![\w./\\-])--(?=\w+(?![\w/\\-]|\.\w))", "", str(error))
        for name, argument in names.items():
            text = re.sub(rf"^{name}(?=:)", argument, text)
        raise UserError(text) from error.__cause__


_leaving = threading.Event()  # set when a command's end has begun


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C is; `terminate_cleanly` has it raised."""


def terminate_cleanly() -> None:
    """From now on SIGTERM, or a terminal that closes, raises `Terminated`: `finally` blocks run.

    Once: a second one, as from a job scheduler and from the parent, must not cut the clean-up. But
    again where it was lost on its way, as in a package's `except:` or in code in C that clears
    errors, which happens while packages are imported: so nobody can catch it and go on.
    """
    _leaving.clear()
    on_its_way: Callable[[], Terminated | None] | None = None

    def handle(signum: int, frame: object) -> None:
        nonlocal on_its_way
        if on_its_way is None:
            with contextlib.suppress(RuntimeError):  # there is no thread to be had
                threading.Thread(target=insist, args=(signum,), daemon=True).start()
        elif on_its_way() is not None or _leaving.is_set():
            return
        error = Terminated()
        on_its_way = weakref.ref(error)
        try:
            raise error
        finally:
            del error  # which this frame, and with it the error's own traceback, would hold

    def insist(signum: int) -> None:
        while not _leaving.wait(_SWALLOWED_S):
            if on_its_way is not None and on_its_way() is None:
                os.kill(os.getpid(), signum)

    for number in _terminating():
        signal.signal(number, handle)


def _terminating() -> Iterator[signal.Signals]:
    """SIGTERM and SIGHUP, of a terminal that closes, unless nohup has it ignored."""
    yield signal.SIGTERM
    closes = getattr(signal, "SIGHUP", None)  # not on Windows
    if closes and signal.getsignal(closes) is not signal.SIG_IGN:
        yield closes


def did_you_mean(words: str | Iterable[str], known: Iterable[str]) -> str:
    """`; did you mean X?` for the known names that are spelt like `words`, else nothing."""
    names = {name.lower(): name for name in known}
    wrong = [words] if isinstance(words, str) else words
    near = [match for one in wrong for match in difflib.get_close_matches(one.lower(), names, n=1)]
    return f"; did you mean {', '.join(names[match] for match in near)}?" if near else ""


def listed(names: Sequence[str], most: int = 10) -> str:
    """`a, b, c`, and of more than `most` names how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_choice(flag: str, value: str, valid: Iterable[str]) -> None:
    """UserError unless the value of `flag` is one of the valid ones."""
    names = list(valid)
    if value not in names:
        raise UserError(f"{flag} {value}: choose from {', '.join(names)}", got=value, valid=names)


def check_known(what: str, names: Iterable[str], valid: Iterable[str]) -> None:
    """UserError, beginning with `what`, for names that are none of the valid ones."""
    known = list(valid)
    if unknown := [name for name in names if name not in known]:
        message = f"{what} {', '.join(unknown)}; valid are {', '.join(known)}"
        raise UserError(message, got=unknown, valid=known)


def of_type(flag: str, value: object, kind: Any) -> Any:
    """The value of an argument as its type has it: paths are text, whole numbers are floats, too.

    kind: a type, or several joined by |. UserError for a value of another.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a number of NumPy
    kinds = get_args(kind) or (kind,)
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) not in kinds:  # not isinstance: True is no number
        raise UserError(f"{flag} {value!r}: its type must be {getattr(kind, '__name__', kind)}")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{flag} {value!r}: it has a character that no name has")
    return value


def check_at_least(args: object, lowest: dict[str, int]) -> None:
    """UserError for the first flag of parsed `args` whose value is below its lowest one."""
    for name, least in lowest.items():
        value = getattr(args, name, least)
        if value < least:
            raise UserError(f"--{name} is {value}, it must be at least {least}")


def describe_os_error(error: OSError) -> str | None:
    """One line for an error of files and folders, None for any other (of the network, say)."""
    if error.errno in _DISK_FULL:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}: free some space and start the same command again"
    if not error.filename or not error.strerror:
        return None
    if error.errno == errno.EEXIST:  # of a folder to be made, where a file is
        return f"{error.filename} is in the way: it is not a folder"
    return f"cannot use {error.filename}: {error.strerror}"


def describe_blob_error(error: Exception) -> str | None:
    """One line for an error of the blob store, None for any other."""
    package = sys.modules.get("blobfile")  # loaded, if it is the one that raised this
    if package is None or not isinstance(error, package.Error):
        return None
    return f"the blob store: {first_line(error)}"


def describe_peer_error(error: Exception) -> str | None:
    """One line for the end of a process that we work with, None for any other error."""
    if not isinstance(error, RuntimeError):
        return None
    return next((line for part, line in _PEER_ENDED.items() if part in str(error)), None)


def first_line(error: Exception, most: int = 300) -> str:
    """What an error of another package says, cut to one line of at most `most` characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def run_main(main: Callable[[], object]) -> None:
    """Run a script's `main`; see `errors_in_one_line`."""
    with errors_in_one_line():
        main()


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """For a script's imports and its `main`: what the user can mend is one line and an exit code.

    `UserError` and files that cannot be used end in exit code 2, a full disk in 74, files and blob
    stores that fail for the moment and the end of another process in 1, Ctrl-C in 130, `Terminated`
    in 143; any other exception is a fault of the program and keeps its traceback.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except Terminated:
        print("terminated", file=sys.stderr)
        sys.exit(EXIT_TERMINATED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # `… | head` has enough; Python would complain again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except Exception as error:
        is_file = isinstance(error, OSError)
        message = describe_os_error(error) if is_file else describe_blob_error(error)
        message = message or describe_peer_error(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(_os_exit_code(error) if is_file else EXIT_MAY_PASS)
    finally:
        _leaving.set()


def _os_exit_code(error: OSError) -> int:
    if error.errno in _DISK_FULL:
        return EXIT_DISK_FULL
    return EXIT_MAY_PASS if error.errno in _MAY_PASS else EXIT_USER_ERROR
