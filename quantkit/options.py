"""A format's options as text: `key=value`, `PATTERN:key=value,...`, and the table that --help shows.

Every field of a format's `Config` is an option, so a new format needs no command-line code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from quantkit.formats.base import Format, FormatConfig

_OVERRIDE = re.compile(r"(?P<pattern>.+):(?P<options>[A-Za-z_]\w*\s*=[^:]*)", re.DOTALL)

#: Formats without a `bits` option have one width; asking for that one is not an error.
_FIXED_BITS = {"nf4": (4,), "awq": (4,), "fp8": (8,), "ternary": (2,)}


@dataclass(frozen=True)
class OptionHelp:
    """One row of a format's table of options."""

    name: str
    values: str
    default: str
    description: str


def parse_value(text: str) -> Any:
    """The value of `key=value`: a number, true/false, none, or the text itself."""
    word = text.strip()
    if word.lower() in ("none", "null"):
        return None
    if word.lower() in ("true", "yes", "on"):
        return True
    if word.lower() in ("false", "no", "off"):
        return False
    try:
        value = json.loads(word)
    except ValueError:
        return word
    return value if not isinstance(value, float) or word.lower() != "nan" else word


def parse_assignments(items: Iterable[str], where: str) -> dict[str, Any]:
    """`["bits=8", "group_size=64"]` -> dict; `where` names the flag in errors."""
    result: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise UsageError(f"{where} {item!r} is not key=value", hint=f"Example: {where} group_size=64.")
        if key in result:
            raise UsageError(f"{where} gives {key!r} twice")
        result[key] = parse_value(value)
    return result


def parse_override(text: str) -> tuple[str, dict[str, Any]]:
    """`'PATTERN:bits=8,group_size=64'` -> (pattern, options). The pattern may itself hold colons."""
    match = _OVERRIDE.fullmatch(text)
    if not match:
        raise UsageError(
            f"--override {text!r} is not PATTERN:key=value[,key=value...]",
            hint="Example: --override 'down_proj:bits=8,group_size=64'.",
        )
    # A comma separates options unless it is inside brackets: weight_block_size=[128,128].
    items = re.split(r",(?![^\[]*\])", match["options"])
    return match["pattern"], parse_assignments(items, "--override")


def read_overrides(items: Iterable[str]) -> list[str]:
    """Overrides as given, those of `@FILE` (one a line, # comments) in its place."""
    found: list[str] = []
    for item in items:
        if not item.startswith("@"):
            found.append(item)
            continue
        try:
            lines = Path(item[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UsageError(
                f"--override {item}: {reason}", hint="Name a file with an override a line."
            ) from None
        found += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return found


def collect_options(
    fmt: Format,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    sym: bool | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The options of `fmt` that the common flags and `--set key=value` ask for, under its own names."""
    fields = fmt.Config.model_fields
    options = dict(settings or {})

    def put(flag: str, key: str, value: Any) -> None:
        if key in options and options[key] != value:
            raise UsageError(f"{flag} {value} and --set {key}={options[key]} contradict each other")
        options[key] = value

    if bits is not None:
        if "bits" in fields or bits not in _FIXED_BITS.get(fmt.name, ()):
            _known(fmt, "bits", "--bits")
            put("--bits", "bits", bits)
    if group_size is not None:
        key = "block_size" if "block_size" in fields and "group_size" not in fields else "group_size"
        _known(fmt, key, "--group-size")
        put("--group-size", key, group_size)
    if sym is not None:
        inverse = "zero_point" in fields and "sym" not in fields
        key = "zero_point" if inverse else "sym"
        _known(fmt, key, "--sym" if sym else "--asym")
        put("--sym/--asym:", key, not sym if inverse else sym)
    build_config(fmt, options)
    return options


def _known(fmt: Format, key: str, flag: str) -> None:
    if key not in fmt.Config.model_fields:
        raise UsageError(
            f"format {fmt.name} has no option {key!r} ({flag})",
            hint=f"It has: {', '.join(fmt.Config.model_fields) or 'none'}; see `quantkit formats {fmt.name}`.",
        )


def build_config(fmt: Format, options: Mapping[str, Any], where: str = "") -> FormatConfig:
    """The validated Config of `fmt`; UsageError naming the option that is wrong."""
    from pydantic import ValidationError

    fields = fmt.Config.model_fields
    for key in options:
        if key not in fields:
            raise UsageError(
                f"{where}format {fmt.name} has no option {key!r}", hint=did_you_mean(key, list(fields))
            )
    try:
        return fmt.Config.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"][:1])
        message = first["msg"].removeprefix("Value error, ")
        said = f"option {key} is {options.get(key)!r}: " if key else ""
        raise UsageError(
            f"{where}format {fmt.name}: {said}{message}", hint=f"See `quantkit formats {fmt.name}`."
        ) from None


def describe_options(fmt: Format) -> list[OptionHelp]:
    """What `quantkit formats NAME` prints: one row per field of the format's Config."""
    rows = []
    for name, field in fmt.Config.model_fields.items():
        rows.append(
            OptionHelp(
                name,
                _values(field.annotation),
                _default(field.get_default(call_default_factory=True)),
                field.description or "",
            )
        )
    return rows


def _values(annotation: Any) -> str:
    import types
    import typing

    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return " | ".join(_default(value) for value in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_values(part) for part in typing.get_args(annotation))
    if origin is typing.Annotated:
        return _values(typing.get_args(annotation)[0])
    if annotation in (None, type(None)):
        return "none"
    names = {bool: "true | false", int: "integer", float: "number", str: "text"}
    return names.get(annotation, str(annotation).replace("typing.", ""))


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
