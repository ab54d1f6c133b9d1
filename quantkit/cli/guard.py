"""How failures look on the command line: one line, an exit code, no traceback unless asked for.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | the checkpoint does not verify, or another expected failure |
| 2 | the request is wrong: an unknown format or option |
| 3 | a checkpoint or its config.json cannot be trusted or read |
| 4 | calibration data |
| 5 | the destination |
| 6 | NaN, Inf or overflow in the numbers |
| 70 | a bug in quantkit |
| 130 | interrupted |
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shlex
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from quantkit.errors import DestinationError, QuantkitError

P = ParamSpec("P")
R = TypeVar("R")

EXIT_FAILED = 1
EXIT_BUG = 70
EXIT_INTERRUPTED = 130

#: The arguments of the running command, as typed: for messages and for the model card.
COMMAND: list[str] = []


def command_line(*, without: tuple[str, ...] = ()) -> str:
    """The running command as it could be typed again, leaving some flags out."""
    return shlex.join(["quantkit", *(word for word in COMMAND if word not in without)])


def error_line(message: str, *, prefix: str = "error: ", style: str = "red") -> None:
    """Print `error: message` on stderr, in colour on a terminal."""
    from rich.console import Console
    from rich.text import Text

    with contextlib.suppress(OSError):  # stderr may be a file on the disk that is full
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            Text.assemble((prefix, f"bold {style}"), message)
        )


def guarded(resumable: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a command: expected failures become one line and the error's exit code.

    The command's `debug` argument, when true, lets every exception through with its traceback.
    """

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(command)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return command(*args, **kwargs)
            except SystemExit:
                raise
            except KeyboardInterrupt:
                interrupted(resumable)
                raise SystemExit(EXIT_INTERRUPTED) from None
            except BrokenPipeError:
                # The reader of our output has gone (`| head`): nothing is left to say.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise SystemExit(0) from None
            except BaseException as error:
                if _is_exit(error):
                    raise
                if kwargs.get("debug"):
                    raise
                raise SystemExit(report(error)) from None

        return wrapper

    return decorate


def report(error: BaseException) -> int:
    """Print one line about `error` and return the exit code."""
    if isinstance(error, QuantkitError):
        error_line(str(error))
        return error.exit_code
    line = " ".join(str(error).split())
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        error_line(
            f"out of memory ({line[:200] or type(error).__name__}). "
            "Use --device cpu, fewer --samples or a shorter --seqlen."
        )
        return EXIT_FAILED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        where = f" ({error.filename})" if error.filename else " (of the output of this command?)"
        error_line(f"the system refuses to write: {error.strerror}{where}. Free space, then try again.")
        return DestinationError.exit_code
    error_line(
        f"internal error: {type(error).__name__}: {line[:400]}. "
        "This is a bug in quantkit, please report it; rerun with --debug for the traceback."
    )
    return EXIT_BUG


#: Whether the running command has said that it was interrupted.
announced = False


def interrupted(resumable: bool) -> int:
    """Say once how to go on after an interruption; returns the exit code."""
    global announced
    if announced:
        return EXIT_INTERRUPTED
    announced = True
    message = "the destination is as it was." if resumable else "nothing was written."
    if resumable and "--dry-run" not in COMMAND:
        again = command_line() if "--resume" in COMMAND else f"{command_line()} --resume"
        message += f" To go on where this stopped: {again}"
    error_line(message, prefix="interrupted: ", style="yellow")
    return EXIT_INTERRUPTED


def _is_exit(error: BaseException) -> bool:
    """Whether this is typer's own control flow (its classes move between typer versions)."""
    import typer

    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, typer.Exit | typer.Abort | typer.BadParameter) or "ClickException" in names
