"""Errors that a person can act on: one line saying what is wrong, where, and what to do."""

from __future__ import annotations


class QuantkitError(Exception):
    """Base of all expected failures. `str(error)` is one line: what, where, what to do.

    The command line prints it without a traceback (`--debug` shows one) and exits with
    `exit_code`; anything that is not a QuantkitError is a bug.
    """

    exit_code = 1

    def __init__(self, what: str, *, hint: str = "") -> None:
        what, hint = printable_line(what), printable_line(hint)
        super().__init__(f"{what}. {hint}" if hint else what)
        self.what = what
        self.hint = hint


def printable_line(text: object, limit: int = 2000) -> str:
    """`text` as one line that a terminal prints as it is: names in it may come from a stranger's file."""
    line = " ".join(str(text).split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


class UsageError(QuantkitError):
    """The request itself is wrong: an unknown format, an option that the format does not have."""

    exit_code = 2


class CheckpointError(QuantkitError):
    """A checkpoint cannot be trusted or read: names the file and the tensor."""

    exit_code = 3


class ConfigError(CheckpointError):
    """`config.json` or its `quantization_config` is wrong, contradictory or unsupported."""


class CalibrationError(QuantkitError):
    """The calibration data is missing, empty, too short, or does not fit the model."""

    exit_code = 4


class DestinationError(QuantkitError):
    """The output cannot be written: it exists, is a file, is locked, or the disk is full."""

    exit_code = 5


class NumericsError(QuantkitError):
    """A weight or a statistic is NaN, Inf or beyond what the format can hold."""

    exit_code = 6


def did_you_mean(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Hint text for an unknown name: the closest known one, else the list."""
    import difflib

    close = difflib.get_close_matches(word.lower(), [k.lower() for k in known], n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}? Known: {', '.join(known)}."
    return f"Known: {', '.join(known)}."
