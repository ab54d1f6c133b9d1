"""What an evaluation returns: plain dataclasses, the same for Python, --json and the report."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from quantkit.eval.divergence import Divergence
from quantkit.eval.perplexity import Perplexity
from quantkit.report_types import Report

T = TypeVar("T")


def from_plain(kind: type[T], data: Any) -> T:
    """The report object of class `kind` that `to_json()` made `data` of (None for a number: infinite).

    TypeError or ValueError when `data` is not of that shape.
    """
    return typing.cast(T, _restore(kind, data))


def _restore(hint: Any, data: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(data, Mapping):
            raise TypeError(f"{hint.__name__} from {type(data).__name__}")
        hints = typing.get_type_hints(hint)
        return hint(**{key: _restore(hints[key], value) for key, value in data.items() if key in hints})
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if data is None else _restore(next(a for a in arguments if a is not type(None)), data)
    if origin is list:
        if not isinstance(data, list):
            raise TypeError(f"a list from {type(data).__name__}")
        return [_restore(arguments[0], item) for item in data]
    if origin is dict:
        return dict(data)
    if hint is float:
        return math.inf if data is None else float(data)
    if hint is Any or isinstance(data, hint):
        return data
    raise TypeError(f"{hint.__name__} from {type(data).__name__}")


@dataclass
class LayerError(Report):
    """What one quantized linear layer loses on the inputs that it really gets."""

    name: str  # as the source's checkpoint spells it: what --override and --skip match
    layer: int | None  # number of the decoder layer
    kind: str  # the name's part below its layer: "mlp.down_proj"
    bits_per_weight: float
    relative: float  # norm(W x - W_hat x) / norm(W x), over all tokens
    cosine: float  # mean over tokens of the cosine between W x and W_hat x
    tokens: int
    advice: list[str] = field(default_factory=list)  # flags of `quantkit convert`, best first
    bits: int | None = None  # the layer's own width and group size, where its codes are integers in groups
    group_size: int | None = None


@dataclass
class CheckScore(Report):
    """One built-in check (see `quantkit.eval.checks`)."""

    name: str
    accuracy: float
    stderr: float
    chance: float  # accuracy of a model that knows nothing
    gain: float  # nats per token by which the log-likelihood rises when the answer is in the context
    items: int
    description: str


@dataclass
class TaskScore(Report):
    """One metric of one lm-eval task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int | None
    version: str = ""


@dataclass
class SpeedPoint(Report):
    """Throughput of one phase at one batch size and context."""

    phase: str  # "prefill" or "decode"
    batch: int
    context: int  # tokens per sequence before the measured step
    tokens_per_second: float  # median over the runs
    low: float  # slowest run
    high: float  # fastest run
    runs: int
    seconds: float  # median time of one step (decode: one token of each sequence)
    bandwidth_share: float | None = None  # decode: weight bytes read / time / the device's copy bandwidth


@dataclass
class Speed(Report):
    """Speed and memory of one model on one device."""

    device: str
    dtype: str
    threads: int | None  # CPU threads
    load_seconds: float
    weight_bytes: int  # parameters and buffers as they lie in memory
    peak_memory: int  # bytes: device memory, or on a CPU the process's resident growth while measuring
    time_to_first_token: float | None  # median seconds, one sequence of the longest context
    bandwidth: float | None  # bytes/s read from memory, measured on this device in this run
    points: list[SpeedPoint] = field(default_factory=list)

    def find(self, phase: str, batch: int, context: int) -> SpeedPoint | None:
        """The point of a phase, batch size and context, if it was measured."""
        for point in self.points:
            if (point.phase, point.batch, point.context) == (phase, batch, context):
                return point
        return None


@dataclass
class EvalRow(Report):
    """One checkpoint."""

    checkpoint: str
    format: str | None  # None: not quantized
    bits_per_weight: float  # of the quantized layers; of the whole model when none is quantized
    bits_per_weight_model: float
    size: int  # bytes of all tensors
    perplexity: Perplexity
    divergence: Divergence | None = None  # from the reference
    is_reference: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of the format
    layers: list[LayerError] = field(default_factory=list)  # in the model's order
    checks: list[CheckScore] = field(default_factory=list)
    tasks: list[TaskScore] = field(default_factory=list)
    speed: Speed | None = None
    load_seconds: float | None = None
    sha256: str | None = None  # over the weights and config.json
    note: str = ""  # what somebody should know about this row

    def worst_layers(self, count: int = 5) -> list[LayerError]:
        """The layers with the largest output error, worst first."""
        return sorted(self.layers, key=lambda layer: -layer.relative)[:count]


@dataclass
class EvalResult(Report):
    """What `quantkit eval` prints; the reference, where there is one, is the first row."""

    data: str
    protocol: str
    tokens: int  # of the text
    device: str
    reference: str | None
    rows: list[EvalRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    date: str = ""

    @property
    def candidates(self) -> list[EvalRow]:
        """The rows that are not the reference."""
        return [row for row in self.rows if not row.is_reference]

    def to_text(self) -> str:
        """The table as plain text."""
        from quantkit.eval.table import to_text

        return to_text(self)
