"""Architecture facts as data: which norm or linear feeds which linears of a decoder layer.

A *scale group* is a place where per-channel scales can be moved from an input to its weights without
changing what the layer computes (this is AWQ's and SmoothQuant's degree of freedom):

    y = W x,  x = producer(...)        =>        y = (W diag(s)) (diag(1/s) x)

`diag(1/s)` is folded into the producer (a norm's weight, or some output rows of a linear), `diag(s)`
into the columns of every consumer. The table `FAMILIES` states the groups of known architectures by
module path; `discover_groups` finds them in unknown ones by experiment: a candidate is kept only if
random scales leave the layer's output unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["rmsnorm", "rmsnorm_plus_one", "layernorm", "linear_rows"]


@dataclass(frozen=True)
class ScaleGroup:
    """One producer and the linears that read its output (paths are relative to the decoder layer).

    kind        how `1/s` is folded into the producer:
                rmsnorm: w / s; rmsnorm_plus_one (Gemma): (1 + w) / s - 1; layernorm: w / s, b / s;
                linear_rows: rows `rows[0]:rows[1]` of weight and bias are divided by s
    consumers   linears whose columns are multiplied by s (those to be quantized are among them)
    also        further consumers with a weight `[*, K]` that must be compensated (a MoE router)
    heads       (kv_heads, repeats, head_dim) where the consumer's columns repeat the producer's rows,
                as o_proj does with v_proj under grouped-query attention; None: one to one
    width       number of free scales
    """

    producer: str
    kind: Kind
    consumers: tuple[str, ...]
    width: int
    also: tuple[str, ...] = ()
    rows: tuple[int, int] | None = None
    heads: tuple[int, int, int] | None = None

    def expand(self, scale: Tensor) -> Tensor:
        """Free scales `[width]` -> one per consumer column `[K]`."""
        if self.heads is None:
            return scale
        kv_heads, repeats, head_dim = self.heads
        return scale.view(kv_heads, 1, head_dim).expand(kv_heads, repeats, head_dim).reshape(-1)

    def pool(self, per_column: Tensor) -> Tensor:
        """Mean of per-column values `[K]` over the columns that share a free scale: `[width]`."""
        if self.heads is None:
            return per_column
        kv_heads, repeats, head_dim = self.heads
        return per_column.view(kv_heads, repeats, head_dim).mean(1).reshape(-1)


@dataclass(frozen=True)
class Rule:
    """A group before it meets a layer: `*` stands for an expert's index, the same on both sides when
    the producer has one. `slice` names which rows of a fused producer feed the consumer."""

    producer: str
    consumers: tuple[str, ...]
    also: tuple[str, ...] = ()
    slice: Literal["all", "value", "last_half"] = "all"


@dataclass(frozen=True)
class Family:
    """Rules of an architecture; rules whose producer or consumers a layer lacks do not apply to it."""

    rules: tuple[Rule, ...]
    norm: Literal["rmsnorm", "rmsnorm_plus_one", "layernorm"] = "rmsnorm"


_QKV = Rule("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
_VALUE = Rule("self_attn.v_proj", ("self_attn.o_proj",), slice="value")
_DOWN = Rule("mlp.up_proj", ("mlp.down_proj",))
_MLP = Rule("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
_MLP_PRE = Rule("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
_MOE = Rule(
    "post_attention_layernorm",
    (
        "mlp.experts.*.gate_proj",
        "mlp.experts.*.up_proj",
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
    ),
    also=("mlp.gate", "mlp.shared_expert_gate"),
)
_MOE_DOWN = Rule("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",))
_SHARED_DOWN = Rule("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",))

_LLAMA = Family((_QKV, _VALUE, _MLP, _DOWN))
_GEMMA = Family((_QKV, _VALUE, _MLP, _DOWN), norm="rmsnorm_plus_one")
_GEMMA2 = Family((_QKV, _VALUE, _MLP_PRE, _DOWN), norm="rmsnorm_plus_one")
_PHI3 = Family(
    (
        Rule("input_layernorm", ("self_attn.qkv_proj",)),
        Rule("self_attn.qkv_proj", ("self_attn.o_proj",), slice="value"),
        Rule("post_attention_layernorm", ("mlp.gate_up_proj",)),
        Rule("mlp.gate_up_proj", ("mlp.down_proj",), slice="last_half"),
    )
)
_MIXTURE = Family((_QKV, _VALUE, _MLP, _DOWN, _MOE, _MOE_DOWN, _SHARED_DOWN))

#: config.json's model_type -> facts. Checked against transformers 5.23 by tests/test_topology.py.
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "granite": _LLAMA,
    "smollm3": _LLAMA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "phi3": _PHI3,
    "mixtral": _MIXTURE,
    "qwen2_moe": _MIXTURE,
    "qwen3_moe": _MIXTURE,
}


def scale_groups(layer: nn.Module, model_type: str) -> list[ScaleGroup]:
    """The scale groups of one decoder layer, in the order of computation; [] for unknown families.

    `layer` is only looked at (shapes, `self_attn.head_dim`); it may live on the meta device. Experts
    must be separate modules (`quantkit.experts`). A rule is left out where it would not be exact.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        return []
    modules = {name: m for name, m in layer.named_modules() if name}
    groups: list[ScaleGroup] = []
    for rule in family.rules:
        for producer in _matches(rule.producer, modules):
            star = _star(rule.producer, producer)
            wanted = [c.replace("*", star) if star else c for c in rule.consumers]
            consumers = tuple(name for c in wanted for name in _matches(c, modules))
            if not consumers:
                continue
            also = tuple(name for c in rule.also for name in _matches(c, modules))
            group = _resolve(modules, rule, family, producer, consumers, also)
            if group is not None:
                groups.append(group)
    return groups


def _matches(pattern: str, modules: Iterable[str]) -> list[str]:
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return [name for name in modules if expression.fullmatch(name)]


def _star(pattern: str, name: str) -> str:
    found = re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
    return found.group(1) if found and found.groups() else ""


def _resolve(
    modules: dict[str, nn.Module],
    rule: Rule,
    family: Family,
    producer: str,
    consumers: tuple[str, ...],
    also: tuple[str, ...],
) -> ScaleGroup | None:
    """The rule on one layer, or None where shapes say that it would not be exact."""
    source = modules[producer]
    columns = {_weight(modules[c]).shape[1] for c in consumers + also}
    if len(columns) != 1:
        return None
    width = columns.pop()
    if not isinstance(source, nn.Linear):
        if _weight(source).shape != (width,):
            return None
        kind: Kind = family.norm
        return ScaleGroup(producer, kind, consumers, width, also)
    if rule.slice == "last_half":
        rows = (source.out_features - width, source.out_features)
        fits = source.out_features == 2 * width
        return ScaleGroup(producer, "linear_rows", consumers, width, also, rows) if fits else None
    if rule.slice == "all":
        fits = source.out_features == width
        return ScaleGroup(producer, "linear_rows", consumers, width, also, (0, width)) if fits else None
    fused = source.out_features > width
    return _resolve_value(modules, producer, source, consumers, width, also, fused)


def _resolve_value(
    modules: dict[str, nn.Module],
    producer: str,
    source: nn.Linear,
    consumers: tuple[str, ...],
    width: int,
    also: tuple[str, ...],
    fused: bool,
) -> ScaleGroup | None:
    """v_proj (or the v rows of a `fused` q, k, v) -> o_proj: query head h reads kv head h // repeats."""
    values = (source.out_features - width) // 2 if fused else source.out_features
    if values <= 0 or width % values or (fused and width + 2 * values != source.out_features):
        return None
    rows = (source.out_features - values, source.out_features)
    if values == width:
        return ScaleGroup(producer, "linear_rows", consumers, width, also, rows)
    head_dim = getattr(modules[producer.rpartition(".")[0]], "head_dim", None)
    if not isinstance(head_dim, int) or head_dim <= 0 or values % head_dim:
        return None
    heads = (values // head_dim, width // values, head_dim)
    return ScaleGroup(producer, "linear_rows", consumers, values, also, rows, heads)


def _weight(module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight")
    return weight


@torch.no_grad()
def apply_scale(
    layer: nn.Module, group: ScaleGroup, scale: Tensor, store_dtype: torch.dtype | None = None
) -> Tensor:
    """Fold `scale` (`[width]`, positive, finite) into the layer in place; returns the scale used.

    With `store_dtype`, a norm is rounded to that dtype and the consumers get the scale that the
    rounded norm really has, so that writing the norm in bfloat16 costs nothing. Channels whose norm
    weight is zero (or would leave the dtype's range) keep the scale 1.
    """
    producer = layer.get_submodule(group.producer)
    weight = _weight(producer)
    bias = getattr(producer, "bias", None)
    scale = scale.to(weight.device, torch.float32).clone()
    if group.kind == "linear_rows":
        assert group.rows is not None
        weight[slice(*group.rows)].div_(scale[:, None])
        if bias is not None:
            bias[slice(*group.rows)].div_(scale)
    else:
        offset = 1.0 if group.kind == "rmsnorm_plus_one" else 0.0
        before = weight.float() + offset
        after = before / scale - offset
        if store_dtype is not None:
            after = after.to(store_dtype).float()
        scale = before / (after + offset)
        broken = ~torch.isfinite(scale) | (scale <= 0) | (before == 0)
        scale[broken] = 1.0
        weight.copy_(torch.where(broken, weight.float(), after))
        if bias is not None:
            bias.div_(scale)
    columns = group.expand(scale)
    for path in group.consumers + group.also:
        _weight(layer.get_submodule(path)).mul_(columns[None, :])
    return scale


# --- unknown architectures: find groups by experiment -------------------------------------------


def discover_groups(
    layer: nn.Module, run: Callable[[], Tensor], tolerance: float = 1e-4
) -> tuple[list[ScaleGroup], list[str]]:
    """Scale groups of a layer that no table describes, and remarks about what was not found.

    `run()` runs the layer (float32) on a few calibration tokens and returns its output. Norms count
    as producers of the linears whose input *is* their output tensor; linears as producers of later
    linears of matching width. Every candidate is then tried with random scales and dropped unless the
    output stays within `tolerance` (relative L2). The layer is left as it was.
    """
    reads, writes, order = _trace(layer, run)
    reference = run()
    groups: list[ScaleGroup] = []
    served: set[str] = set()
    for name in order:
        weight = _weight(layer.get_submodule(name))
        if weight.dim() == 1:
            group = _norm_candidate(layer, name, writes[name], reads, weight.shape[0])
            kinds: tuple[Kind, ...] = ("rmsnorm", "rmsnorm_plus_one")
            tries = [replace(group, kind=k) for k in kinds] if group else []
        else:
            earlier = order[: order.index(name)]
            tries = [g for p in reversed(earlier) for g in _linear_candidate(layer, p, name, served)]
        for candidate in tries:
            if _keeps_output(layer, candidate, run, reference, tolerance):
                groups.append(candidate)
                served.update(candidate.consumers)
                break
    linears = [n for n in order if isinstance(layer.get_submodule(n), nn.Linear)]
    missing = [n for n in linears if n not in served]
    notes = [f"no norm or linear was found to feed {n}: clip search only" for n in missing]
    return groups, notes


def _trace(
    layer: nn.Module, run: Callable[[], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Run once; inputs of linears, outputs of modules with a weight, and names in order of execution."""
    reads: dict[str, Tensor] = {}
    writes: dict[str, Tensor] = {}
    order: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if not isinstance(output, Tensor) or name in writes:
                return
            writes[name] = output
            order.append(name)
            if isinstance(module, nn.Linear) and args and isinstance(args[0], Tensor):
                reads[name] = args[0]

        return record

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in layer.named_modules()
        if name and isinstance(getattr(module, "weight", None), Tensor) and not list(module.children())
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return reads, writes, order


def _norm_candidate(
    layer: nn.Module, name: str, output: Tensor, reads: dict[str, Tensor], width: int
) -> ScaleGroup | None:
    """The norm `name` with the linears that were called with its output (or a view of it)."""
    same = [n for n, x in reads.items() if x.data_ptr() == output.data_ptr() and x.shape[-1] == width]
    return ScaleGroup(name, "rmsnorm", tuple(same), width) if same else None


def _linear_candidate(layer: nn.Module, producer: str, consumer: str, served: set[str]) -> list[ScaleGroup]:
    """producer -> consumer, as rows one to one, as the last half of fused rows, or as value heads."""
    source, target = layer.get_submodule(producer), layer.get_submodule(consumer)
    if consumer in served or not (isinstance(source, nn.Linear) and isinstance(target, nn.Linear)):
        return []
    modules = dict(layer.named_modules())
    n, k = source.out_features, target.in_features
    found = []
    if n in (k, 2 * k, 3 * k):
        found.append(ScaleGroup(producer, "linear_rows", (consumer,), k, (), (n - k, n)))
    if n < 3 * k and n != k:
        value = _resolve_value(modules, producer, source, (consumer,), k, (), fused=n > k)
        found.extend([value] if value else [])
    return found


@torch.no_grad()
def _keeps_output(
    layer: nn.Module, group: ScaleGroup, run: Callable[[], Tensor], reference: Tensor, tolerance: float
) -> bool:
    touched = (group.producer, *group.consumers, *group.also)
    saved = {p: {k: v.clone() for k, v in layer.get_submodule(p).state_dict().items()} for p in touched}
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.rand(group.width, generator=generator) * 4 - 2)
    try:
        apply_scale(layer, group, scale)
        output = run()
    finally:
        for path, state in saved.items():
            layer.get_submodule(path).load_state_dict(state)
    error = (output - reference).norm() / reference.norm().clamp(min=1e-30)
    return bool(torch.isfinite(error)) and float(error) <= tolerance
