"""Where was it lost? The error of every quantized linear layer, and what would help.

    relative = norm(W x - W_hat x) / norm(W x)         cosine = mean over tokens of cos(W x, W_hat x)

`x` are the inputs that the layer gets inside the quantized model on a piece of the evaluation text, and `W` is
read from the source one layer at a time, so one model and one dense weight are in memory. Errors therefore
are each layer's own: what layers before it did to `x` is not counted again. (ADR 0041)

AWQ moves scales between neighbouring layers, so there `W` is first scaled to fit (`quantkit.verify.fit_channels`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint import CheckpointReader
from quantkit.encoding import Affine, dequantize
from quantkit.errors import QuantkitError, UsageError
from quantkit.eval.results import LayerError
from quantkit.eval.scoring import Scorer
from quantkit.hub import resolve_model
from quantkit.linear import QuantLinear
from quantkit.load import find_quantized
from quantkit.skeleton import Site, Skeleton
from quantkit.verify import fit_channels

_TOKENS = 1024  # that the errors are measured on
_WINDOW = 512
#: Layers that inference engines fuse into one must have the same options.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_WORST = 5  # layers that get advice
_NEXT_BITS = {1: 2, 2: 3, 3: 4, 4: 8}
_SMALLEST_GROUP, _LARGEST_GROUP = 16, 128


@dataclass
class _Sums:
    """Sums over tokens, in float64 on the CPU."""

    difference: float = 0.0
    norm: float = 0.0
    cosine: float = 0.0
    tokens: int = 0


class SourceWeights:
    """The dense linear weights of the unquantized model, read when asked for."""

    def __init__(self, source: str, *, trust_remote_code: bool = False) -> None:
        self.reader = CheckpointReader(resolve_model(source))
        try:
            if find_quantized(self.reader) is not None:
                raise UsageError(f"{source} is itself quantized, so it has no dense weights to compare with")
            skeleton = Skeleton(self.reader.path, self.reader.config, trust_remote_code=trust_remote_code)
            shapes = {info.name: info.shape for info in self.reader.infos()}
            self.sites: dict[str, Site] = {site.module: site for site in skeleton.sites(shapes)}
        except QuantkitError:
            self.reader.close()
            raise

    def __enter__(self) -> SourceWeights:
        return self

    def __exit__(self, *exc: object) -> None:
        self.reader.close()

    def weight(self, site: Site, device: torch.device) -> Tensor:
        """The weight of a site, float32 `[N, K]` on `device`."""
        value = (
            self.reader.read(site.source)
            if site.index is None
            else self.reader.read_index(site.source, site.index)
        )
        if site.rows is not None:
            value = value[site.rows[0] : site.rows[1]]
        value = value.to(device, torch.float32)
        return value.t() if site.conv1d else value


def layer_errors(
    model: Any, source: SourceWeights, ids: Tensor, *, layout: str | None = None, tokens: int = _TOKENS
) -> list[LayerError]:
    """Errors of all `QuantLinear`s of `model` on the first `tokens` of `ids` (int64 `[T]`), in the model's
    order; layers that no token reaches (experts) are left out. `layout`: the checkpoint's format."""
    sums: dict[str, _Sums] = {}
    handles = []
    modules = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    for name, module in modules.items():
        if name in source.sites:
            hook = _hook(sums.setdefault(name, _Sums()), source, source.sites[name], layout == "awq")
            handles.append(module.register_forward_hook(hook))
    limit = min(_WINDOW, len(ids))
    scorer = Scorer(model)
    try:
        with torch.inference_mode():
            for start in range(0, min(tokens, len(ids)) - limit + 1, limit):
                more = {"logits_to_keep": 1} if scorer.keeps else {}
                model(input_ids=ids[None, start : start + limit].to(scorer.device), **more)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, total in sums.items():
        if total.tokens and total.norm > 0:
            site = source.sites[name]
            found.append(
                LayerError(
                    name=site.name,
                    layer=site.layer,
                    kind=_kind(site.name),
                    bits_per_weight=modules[name].packed.bits_per_weight(),
                    relative=(total.difference / total.norm) ** 0.5,
                    cosine=total.cosine / total.tokens,
                    tokens=total.tokens,
                    **_held(modules[name]),
                )
            )
    return found


def _hook(total: _Sums, source: SourceWeights, site: Site, fitted: bool) -> Any:
    def hook(module: QuantLinear, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        if not len(x):
            return
        got = out.reshape(len(x), -1).float()
        if module.bias is not None:
            got = got - module.bias.float()
        weight = source.weight(site, x.device)
        if fitted:
            weight = fit_channels(weight, dequantize(module.packed, torch.float32))
        want = nn.functional.linear(x, weight)
        total.difference += float((want - got).double().square().sum())
        total.norm += float(want.double().square().sum())
        total.cosine += float(nn.functional.cosine_similarity(want.double(), got.double(), dim=1).sum())
        total.tokens += len(x)

    return hook


def _held(module: QuantLinear) -> dict[str, Any]:
    """Width and group size that a layer's own tensors have; config.json need not say them for each layer."""
    encoding = module.packed.encoding
    return {"bits": encoding.bits, "group_size": encoding.group_size} if isinstance(encoding, Affine) else {}


def _kind(name: str) -> str:
    """ "model.layers.3.mlp.down_proj" -> "mlp.down_proj"; experts' numbers become "*"."""
    tail = re.sub(r"^.*?\.\d+\.", "", name, count=1)
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", tail)


def advise(layers: list[LayerError], checkpoint: str, count: int = _WORST) -> None:
    """Fill `advice` of the `count` worst layers with flags that `quantkit convert` accepts for the
    checkpoint's format: more bits, smaller groups, or leaving the layer alone."""
    with CheckpointReader(resolve_model(checkpoint)) as reader:
        found = find_quantized(reader)
        if found is None:
            return
        for layer in sorted(layers, key=lambda one: -one.relative)[:count]:
            own = _own(found.config.config_for(layer.name), layer)
            members = _fused_names(layer.name, found.layers)
            changes = _changes(found.layout.name, found.config.config, own)
            layer.advice = [f"--override {shlex.quote(f'{members}:{change}')}" for change in changes]
            layer.advice.append(f"--skip {shlex.quote(members)}")


def _own(config: Any, layer: LayerError) -> Any:
    """`config` with the width and group size that the layer's codes have. config.json says what was asked for: hqq's
    once per kind of layer, others' without the groups that an odd shape got."""
    held = {"bits": layer.bits, "group_size": layer.group_size}
    known = {key: value for key, value in held.items() if value is not None and hasattr(config, key)}
    return config.model_copy(update=known) if known else config


def _fused_names(name: str, names: Mapping[str, object]) -> str:
    """A pattern for the layer and those that engines fuse with it."""
    parent, _, leaf = name.rpartition(".")
    plain = not re.search(r"[*?\[\]:]", name)
    for group in _FUSED:
        if leaf in group and all(f"{parent}.{other}" in names for other in group):
            heads = [other.removesuffix("_proj") for other in group]
            if plain and all(len(head) == 1 for head in heads):
                return f"{parent}.[{''.join(heads)}]_proj"
            return f"re:^{re.escape(parent)}\\.({'|'.join(heads)})_proj$"
    return name if plain else f"re:^{re.escape(name)}$"


def _changes(layout: str, default: Any, own: Any) -> list[str]:
    """`key=value` settings that would make a layer better, as far as the format can express them."""
    from quantkit.formats import FORMATS, get_format

    if layout not in FORMATS:
        return []
    fmt = get_format(layout)
    if not isinstance(own, fmt.Config):
        return []
    tried: list[dict[str, Any]] = []
    bits = getattr(own, "bits", None)
    while isinstance(bits, int) and bits in _NEXT_BITS:
        bits = _NEXT_BITS[bits]
        tried.append({"bits": bits})
        if bits == 8:
            break
    for key in ("group_size", "block_size"):
        size = getattr(own, key, None)
        if isinstance(size, int) and size != 0 and (smaller := _smaller(size)) >= _SMALLEST_GROUP:
            tried.append({key: smaller})
    accepted = [change for change in tried if _accepted(fmt, default, own, change)]
    best = [next((c for c in accepted if key in c), None) for key in ("bits", "group_size", "block_size")]
    return [",".join(f"{k}={v}" for k, v in change.items()) for change in best if change]


def _smaller(size: int) -> int:
    """The largest power of two below a group's size that cuts it evenly, at most 128 (-1: a whole row)."""
    if size < 0:
        return _LARGEST_GROUP
    even = size & -size
    return min(even if even < size else size // 2, _LARGEST_GROUP)


def _accepted(fmt: Any, default: Any, own: Any, change: dict[str, Any]) -> bool:
    from quantkit.options import build_config

    try:
        wanted = build_config(fmt, {**own.model_dump(), **change})
    except UsageError:
        return False
    return not fmt.check_overrides(default, wanted)
