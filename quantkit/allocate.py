"""`quantkit.allocate`: bits (and group size) per layer for a given size, from measured sensitivity.

1. The model is converted once for every choice of width and group size, uniformly: these are the weights
   that the format's own algorithm would write.
2. Layers that engines fuse (q, k, v; gate, up; the experts of a layer) form one group. For every group and choice
   the unquantized model gets that group's quantized weights alone, and the KL divergence of its
   predictions is measured on text that is not evaluation data: the group's sensitivity.
3. KL of small independent perturbations adds up, so a dynamic program over groups finds the choices
   with the least summed KL within the size. (Multiple-choice knapsack; Pareto front of (size, KL) per prefix.)
4. The mixture and every uniform choice that is no larger are then measured whole; the mixture is taken where its
   KL is lower by 10 percent, so the result is no worse than uniform bits on this text. (ADR 0043)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.errors import DestinationError, UsageError
from quantkit.formats import get_format
from quantkit.formats.base import Format
from quantkit.knapsack import knapsack
from quantkit.options import build_config
from quantkit.progress import NullProgress, Progress
from quantkit.report_types import Report
from quantkit.sensitivity import Choice, Sensitivity

_TOKENS = 8192
_GROUP_SIZES = (32, 128)  # offered besides the format's own: they fill the gaps between widths
_MARGIN = 0.1  # by which a mixture must beat uniform bits: a smaller gain may not carry over to another text


@dataclass
class GroupChoice(Report):
    """A group of layers that are quantized alike."""

    pattern: str  # for --override
    layers: list[str]
    bits: int
    group_size: int | None
    weights: int
    sensitivity: dict[str, float] = field(default_factory=dict)  # "4:g128" -> KL when only this group has it


@dataclass
class Allocation(Report):
    """Widths for a model, and what they are expected to cost."""

    source: str
    format: str
    options: dict[str, Any]  # with the commonest width and group size
    target_bits: float
    bits_per_weight: float  # of the quantized layers, scales included
    kl_predicted: float  # sum of the groups' sensitivities, nats
    kl_measured: float  # of the mixture, on the same text
    uniform_kl: dict[str, float]  # "4:g128" -> measured KL of the model with that everywhere
    uniform_bits: dict[str, float]  # the same -> bits per weight
    groups: list[GroupChoice] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)  # PATTERN:bits=N,group_size=N
    file: str | None = None

    @property
    def command(self) -> str:
        """The conversion that uses the overrides, without its output."""
        import shlex

        settings = [
            word for key, value in self.options.items() for word in ("--set", f"{key}={_text(value)}")
        ]
        words = ["quantkit", "convert", self.source, "--format", self.format, *settings]
        if self.overrides:
            words += ["--override", f"@{self.file}"] if self.file else []
            words += [] if self.file else [w for o in self.overrides for w in ("--override", o)]
        return shlex.join([*words, "-o", "OUT"])

    def to_text(self) -> str:
        """A few lines for a terminal."""
        counts = Counter(Choice(group.bits, group.group_size) for group in self.groups)
        spread = ", ".join(f"{counts[choice]} groups at {choice}" for choice in sorted(counts))
        lines = [f"{self.bits_per_weight:.3f} bits per weight (asked for {self.target_bits:g}): {spread}"]
        lines.append(
            f"KL on the sensitivity text: {self.kl_measured:.5f} (predicted {self.kl_predicted:.5f})"
        )
        for name, kl in self.uniform_kl.items():
            lines.append(f"  uniform {name} ({self.uniform_bits[name]:.3f} bits per weight): {kl:.5f}")
        lines.append(self.command)
        return "\n".join(lines)


def allocate(
    source: str | os.PathLike[str],
    target_bits: float,
    output: str | os.PathLike[str] | None = None,
    *,
    format: str = "gptq",
    choices: Sequence[int] = (2, 3, 4, 8),
    group_sizes: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    calibration: Any = "builtin",
    samples: int = 128,
    seqlen: int = 1024,
    data: str | None = None,
    tokens: int = _TOKENS,
    workdir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Allocation:
    """Choose width and group size for every group of layers of `source` so that the quantized layers take at most
    `target_bits` per weight, scales included; write the overrides to the file `output`.

    Parameters
    ----------
    format, choices, options: a format with several widths, the widths, and its other options.
    group_sizes: None offers 32, 128 and the format's own, or only what `options` say; 8 bits come with the largest.
    calibration, samples, seqlen: of the conversions. data, tokens: text that sensitivity is measured on; None
        spreads windows over the built-in calibration text, of which evaluation uses nothing.
    workdir: where conversions and measurements are kept, so that another target costs seconds.

    UsageError when the format has one width, no mixture is as small as asked, or `output` is not writable.
    """
    fmt = get_format(format)
    settings, offered = _check(fmt, dict(options or {}), choices, group_sizes, target_bits)
    path = _check_output(output, overwrite)
    progress = progress or NullProgress()
    with _work(workdir) as folder:
        bench = Sensitivity(os.fspath(source), fmt, settings, offered, folder, progress)
        bench.device, bench.trust_remote_code = device, trust_remote_code
        bench.convert_all(calibration=calibration, samples=samples, seqlen=seqlen)
        bench.measure(data, tokens)
        groups = bench.groups
        budget = math.floor(target_bits / 8 * sum(group.weights for group in groups))
        chosen = knapsack([group.sizes for group in groups], [group.kl for group in groups], budget)
        if chosen is None:
            least = 8 * sum(min(g.sizes.values()) for g in groups) / sum(g.weights for g in groups)
            raise UsageError(
                f"{target_bits:g} bits per weight are too few: these choices need {least:.3f}",
                hint="Ask for more, or offer smaller --bits or larger --group-sizes.",
            )
        kl = bench.whole(chosen)
        uniform = {choice: bench.whole([choice] * len(groups)) for choice in bench.choices}
        fitting = [c for c in bench.choices if sum(group.sizes[c] for group in groups) <= budget]
        best = min(fitting, key=uniform.__getitem__, default=None)
        if best is not None and uniform[best] * (1 - _MARGIN) < kl:
            # the sum of sensitivities is a model; the measurement decides
            chosen, kl = [best] * len(groups), uniform[best]
    return _result(bench, chosen, kl, uniform, target_bits, path)


# -- input and output -----------------------------------------------------------------------------


def _check(
    fmt: Format,
    options: dict[str, Any],
    choices: Sequence[int],
    group_sizes: Sequence[int] | None,
    target: float,
) -> tuple[dict[str, Any], list[Choice]]:
    """(the format's other options, everything that a group may be quantized with)."""
    if "bits" not in fmt.Config.model_fields:
        raise UsageError(f"format {fmt.name} has one width", hint="Use gptq or hqq.")
    if not choices:
        raise UsageError("there are no widths to choose from", hint="Example: --bits 2,3,4,8.")
    options.pop("bits", None)
    offered = _offered(fmt, options, choices, group_sizes)
    configs = [build_config(fmt, {**options, **choice.options}) for choice in offered]
    for other in configs[1:]:
        problem = fmt.check_overrides(configs[0], other)
        if problem:
            raise UsageError(f"format {fmt.name} cannot mix widths: {problem}", hint="Use other options.")
    if not (math.isfinite(target) and 0 < target <= 32):
        raise UsageError(f"{target} bits per weight are no target", hint="Example: --target-bits 4.25.")
    if target < min(choices):  # scales come on top; the exact least is known after the conversions
        raise UsageError(
            f"{target:g} bits per weight are too few: the smallest width offered is {min(choices)}",
            hint="Ask for more, or offer smaller --bits.",
        )
    return options, offered


def _offered(
    fmt: Format, options: dict[str, Any], widths: Sequence[int], group_sizes: Sequence[int] | None
) -> list[Choice]:
    """Every width with every group size; widths from 8 bits on, where groups make no difference, with the largest."""
    own = options.pop("group_size", None)
    if "group_size" not in fmt.Config.model_fields:
        return [Choice(bits) for bits in sorted(set(widths))]
    if group_sizes is not None and not group_sizes:
        raise UsageError("there are no group sizes to choose from", hint="Example: --group-sizes 32,128.")
    usual: Any = build_config(fmt, options)
    default = usual.group_size if own is None else own
    sizes = set(group_sizes or ((default,) if own is not None else (*_GROUP_SIZES, default)))
    largest = -1 if -1 in sizes else max(sizes)  # -1: the whole row
    return sorted(Choice(b, g) for b in set(widths) for g in sizes if b < 8 or g == largest)


def _check_output(output: str | os.PathLike[str] | None, overwrite: bool) -> Path | None:
    if output is None:
        return None
    path = Path(output)
    if path.is_dir():
        raise DestinationError(f"{path} is a directory", hint="Name a file for the overrides.")
    if path.exists() and not overwrite:
        raise DestinationError(f"{path} exists", hint="Use --overwrite or another name.")
    return path


@contextlib.contextmanager
def _work(workdir: str | os.PathLike[str] | None) -> Iterator[Path]:
    if workdir is not None:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        yield Path(workdir)
        return
    made = Path(tempfile.mkdtemp(prefix="quantkit-allocate-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _result(
    bench: Sensitivity,
    chosen: list[Choice],
    kl: float,
    uniform: dict[Choice, float],
    target: float,
    path: Path | None,
) -> Allocation:
    groups, weights = bench.groups, sum(group.weights for group in bench.groups)
    held: Counter[Choice] = Counter()
    for group, choice in zip(groups, chosen, strict=True):
        held[choice] += group.weights
    default = held.most_common(1)[0][0]
    out = Allocation(
        source=bench.source,
        format=bench.fmt.name,
        options={**bench.options, **default.options},
        target_bits=target,
        bits_per_weight=8 * sum(g.sizes[c] for g, c in zip(groups, chosen, strict=True)) / weights,
        kl_predicted=sum(g.kl[c] for g, c in zip(groups, chosen, strict=True)),
        kl_measured=kl,
        uniform_kl={str(choice): value for choice, value in uniform.items()},
        uniform_bits={str(c): 8 * sum(g.sizes[c] for g in groups) / weights for c in bench.choices},
        file=None if path is None else str(path),
    )
    for group, choice in zip(groups, chosen, strict=True):
        measured = {str(other): value for other, value in group.kl.items()}
        held_by = (choice.bits, choice.group_size, group.weights)
        out.groups.append(GroupChoice(group.pattern, group.names, *held_by, measured))
        usual = default.options
        changed = [f"{key}={value}" for key, value in choice.options.items() if value != usual[key]]
        if changed:
            out.overrides.append(f"{group.pattern}:{','.join(changed)}")
    if path is not None:
        try:
            path.write_text("".join(line + "\n" for line in out.overrides), encoding="utf-8")
        except OSError as error:
            raise DestinationError(f"{path}: {error.strerror}", hint="Name another file.") from None
    return out


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) or value is None else str(value)
