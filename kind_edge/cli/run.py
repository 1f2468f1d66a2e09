"""From arguments to an exit code: every error becomes one clear line on stderr.

0 done, 1 a gate failed, 2 usage, 3 no plan fits, 4 unreadable or corrupt input, 70 our own bug, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence

import typer

from kind_edge.cli.app import app
from kind_edge.cli.terminal import Terminal
from kind_edge.errors import InputError, KindEdgeError, UsageError

PROGRAM = "kind-edge"
BUG, INTERRUPTED, BROKEN_PIPE = KindEdgeError.exit_code, 130, 141
"""141 is what a shell reports of a program that SIGPIPE ended: the work may have been cut short with its output."""

BUG_TEXT_WIDTH = 200
FIRST_SPEAKS_S = 3.0

_PARSING_ERROR: type = typer.BadParameter.__mro__[1]
"""The parent of all usage errors of whichever click typer stands on: newer ones bring their own."""

_PLACE_ERRORS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
)  # fmt: skip
"""What the system says of a place where one cannot read or write: the user's to mend, no bug of ours."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors are printed, never raised."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with contextlib.suppress(ValueError):  # only a main thread may: a kill then cleans up like Ctrl-C
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    flags, rest = split_verbosity(given)
    verbose = bool({"-v", "--verbose"} & set(flags))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a sign that the terminal cannot show must not end the command
            stream.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            if not verbose and not sys.warnoptions:
                # Libraries warn of their own affairs; what a user can act on comes as an error or in the result.
                warnings.simplefilter("ignore")
                logging.disable(logging.WARNING)
            code = app([*flags, *rest], prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit:  # how rich and typer answer a pipe whose reader has gone: with 1, which is a failed gate here
        return _broken_pipe()
    except Exception as error:  # noqa: BLE001 - this is the boundary where errors become exit codes
        return _report(error, Terminal(verbose=verbose))
    finally:
        logging.disable(logging.NOTSET)
    if code == INTERRUPTED and not _leave_it_to_the_first():
        Terminal().say_error("interrupted")
    return code if isinstance(code, int) else 0


def split_verbosity(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """-v and -q may stand anywhere: (those flags, the other arguments). What follows `--` is left alone."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = [text for text in arguments[:end] if text in ("-v", "-q", "--verbose", "--quiet")]
    rest = [text for text in arguments[:end] if text not in flags]
    return flags, [*rest, *arguments[end:]]


def _report(error: Exception, terminal: Terminal) -> int:
    """Say what is wrong and return the exit code for it."""
    if isinstance(error, BrokenPipeError):
        return _broken_pipe()
    if isinstance(error, UsageError | _PARSING_ERROR) and _leave_it_to_the_first():
        return UsageError.exit_code
    if isinstance(error, _PARSING_ERROR):
        return _report_parsing(error, terminal)
    if isinstance(error, OSError) and error.errno in _PLACE_ERRORS:
        error = UsageError(f"{error.filename or 'output'}: {os.strerror(error.errno or 0)}; choose another place")
    elif isinstance(error, FileNotFoundError):
        error = InputError(f"{error.filename}: no such file or folder")
    if isinstance(error, KindEdgeError) and error.exit_code != BUG:
        terminal.say_error(str(error))
        return error.exit_code
    if terminal.verbose:
        terminal.err.print("".join(traceback.format_exception(error)), markup=False, soft_wrap=True)
    text = " ".join(str(error).split())
    text = text[:BUG_TEXT_WIDTH] + " ..." * (len(text) > BUG_TEXT_WIDTH)  # libraries can fill pages
    terminal.say_error(
        f"a bug in kind-edge: {type(error).__name__}: {text or 'no message'}; "
        "please report it with your command line and what the same command prints with -v"
    )
    return BUG


def _leave_it_to_the_first() -> bool:
    """In a process that a launcher started beside the machine's first one, which was asked the same and says the same.

    As soon as one process has ended the launcher ends the others, so the first is given time to speak.
    """
    beside = int(os.environ.get("WORLD_SIZE") or 1) > 1 and os.environ.get("LOCAL_RANK", "0") != "0"
    if beside:
        time.sleep(FIRST_SPEAKS_S)
    return beside


def _broken_pipe() -> int:
    """Quiet: nobody reads. Python would complain once more when it flushes at exit, so nothing may be left to flush."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def _report_parsing(error: Exception, terminal: Terminal) -> int:
    """A usage error in our style: one line, with click's hint where it has one, and where help is."""
    message: str = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    text = " ".join(message.replace("Value error, ", "").split()).rstrip(".")
    if text:  # no verb at all: the help has been printed instead
        command = context.command_path if context is not None else PROGRAM
        terminal.say_error(f"{text[0].lower()}{text[1:]} (see {command} --help)")
    return UsageError.exit_code
