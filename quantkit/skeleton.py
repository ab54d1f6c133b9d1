"""The model without its weights: which checkpoint tensors are linear layers, and where they go.

`Skeleton` builds the transformers model of a `config.json` on the meta device (no memory), takes fused
MoE experts apart, and maps every tensor name of a checkpoint to the parameters it fills. Linear layers
are found by structure (an `nn.Linear`, a GPT-2 `Conv1D`, one expert of a fused 3-D parameter), not by a
list of architectures, and every shape is checked here, before any work starts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.config_checks import check_counts
from quantkit.errors import CheckpointError, ConfigError
from quantkit.experts import UnfusedExperts, canonical_expert_name, unfuse_experts
from quantkit.meta_model import build_meta_model, checkpoint_renamings

if TYPE_CHECKING:
    from quantkit.checkpoint import CheckpointReader

_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate|gate_network|wg)$")


@dataclass(frozen=True)
class Target:
    """Where (a part of) a checkpoint tensor goes: a parameter of the unfused model."""

    param: str
    index: int | None = None  # slice of the first dimension of a 3-D expert tensor
    rows: tuple[int, int] | None = None  # then these rows


@dataclass(frozen=True)
class Site:
    """One linear weight that could be quantized.

    `name` is the module name that a quantized checkpoint uses for it, `module` its path in the
    (unfused) transformers model, `source` the checkpoint tensor that holds the dense weight.
    `shape` is (out_features, in_features); `conv1d` weights are stored transposed.
    """

    name: str
    module: str
    source: str
    shape: tuple[int, int]
    conv1d: bool = False
    index: int | None = None
    rows: tuple[int, int] | None = None
    layer: int | None = None  # decoder layer number, None outside the stack
    skip: str = ""  # why it is left alone by default ("" when it is to be quantized)


class Skeleton:
    """Meta-device model of a checkpoint directory plus the map from its tensor names.

    Parameters
    ----------
    path: directory with `config.json` (nothing is downloaded, no remote code unless asked).
    config: the parsed `config.json`; a `quantization_config` in it is ignored here.
    weights: the checkpoint, if it is at hand: a config that promises far more layers or experts than
        there are tensors is then refused before a model is built of it.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        *,
        trust_remote_code: bool = False,
        weights: CheckpointReader | None = None,
    ) -> None:
        self.path = path
        self.raw_config = dict(config)
        if weights is not None:
            elements = sum(math.prod(info.shape) for info in weights.infos())
            check_counts(config, path / "config.json", len(weights), elements)
        self.hf_config, self.model = build_meta_model(path, dict(config), trust_remote_code)
        self._transforms = checkpoint_renamings(self.model)
        self.fused_experts = unfuse_experts(self.model)  # left fused -> reason
        self.params: dict[str, torch.Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        self.buffers: dict[str, torch.Tensor] = dict(self.model.named_buffers(remove_duplicate=False))
        self.modules: dict[str, nn.Module] = dict(self.model.named_modules(remove_duplicate=False))
        self.base_prefix: str = getattr(self.model, "base_model_prefix", "") or ""
        self.layers_path = _layers_path(self.model, self.hf_config)
        self.tied = _tied_names(self.model)

    # -- names ------------------------------------------------------------------------------------

    def rename(self, name: str) -> str:
        """Checkpoint tensor name -> the name transformers gives it (experts spelled per expert)."""
        for transform in self._transforms:
            name = transform.rename_source_key(name)[0]
        return canonical_expert_name(name)

    def resolve(self, name: str) -> str | None:
        """Path of the parameter or buffer that checkpoint tensor `name` fills, or None."""
        renamed = self.rename(name)
        for candidate in (
            renamed,
            f"{self.base_prefix}.{renamed}",
            renamed.removeprefix(self.base_prefix + "."),
        ):
            if candidate in self.params or candidate in self.buffers:
                return candidate
        return None

    def module_for(self, base: str) -> str | None:
        """Path of the module whose weight a checkpoint spells `base + ".weight"`, or None."""
        param = self.resolve(base + ".weight")
        return None if param is None else param.removesuffix(".weight")

    def targets(self, name: str, shape: tuple[int, ...]) -> list[Target]:
        """Parameters that checkpoint tensor `name` of `shape` fills; [] when the model has none.

        CheckpointError when the shape is not what the model wants.
        """
        param = self.resolve(name)
        if param is not None:
            want = tuple((self.params.get(param, self.buffers.get(param))).shape)  # type: ignore[union-attr]
            if want != tuple(shape):
                raise CheckpointError(
                    f"tensor {name!r} has shape {list(shape)}, but config.json makes it {list(want)}",
                    hint="The config does not belong to these weights, or the file is damaged.",
                )
            return [Target(param)]
        return self._fused_targets(name, shape)

    def _fused_targets(self, name: str, shape: tuple[int, ...]) -> list[Target]:
        renamed = self.rename(name)
        match = re.match(r"^(?P<experts>.*\.experts)\.(?P<leaf>gate_up_proj|down_proj)(\.weight)?$", renamed)
        if not match or len(shape) != 3:
            return []
        for experts in (match["experts"], f"{self.base_prefix}.{match['experts']}"):
            module = self.modules.get(experts)
            if not isinstance(module, UnfusedExperts):
                continue
            count, inner, hidden = module.num_experts, module.intermediate, module.hidden
            fused_up = match["leaf"] == "gate_up_proj"
            want = (count, 2 * inner, hidden) if fused_up else (count, hidden, inner)
            if tuple(shape) != want:
                raise CheckpointError(
                    f"tensor {name!r} has shape {list(shape)}, but config.json makes it {list(want)}",
                    hint="The config does not belong to these weights, or the file is damaged.",
                )
            out = []
            for i in range(count):
                if fused_up:
                    out.append(Target(f"{experts}.{i}.gate_proj.weight", i, (0, inner)))
                    out.append(Target(f"{experts}.{i}.up_proj.weight", i, (inner, 2 * inner)))
                else:
                    out.append(Target(f"{experts}.{i}.down_proj.weight", i))
            return out
        return []

    # -- structure --------------------------------------------------------------------------------

    def layer_index(self, module: str) -> int | None:
        """Number of the decoder layer that module path belongs to."""
        if self.layers_path and module.startswith(self.layers_path + "."):
            return int(module[len(self.layers_path) + 1 :].split(".", 1)[0])
        return None

    def num_layers(self) -> int:
        """Length of the layer stack (0 when no stack was found)."""
        stack: Any = self.modules[self.layers_path] if self.layers_path else ()
        return len(stack)

    def sites(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Site]:
        """All linear weights among the checkpoint tensors `shapes` (name -> shape), in that order."""
        output = _output_embedding(self.model)
        found: list[Site] = []
        for name, shape in shapes.items():
            for target in self.targets(name, shape):
                module_path = target.param.removesuffix(".weight")
                module = self.modules.get(module_path)
                if not target.param.endswith(".weight") or module is None:
                    continue
                conv1d = type(module).__name__ == "Conv1D"
                if not (isinstance(module, nn.Linear) or conv1d):
                    reason = self._odd_weight(module_path, name, shape)
                    if reason:
                        odd = (int(shape[-2]), int(shape[-1]))
                        found.append(Site(name.removesuffix(".weight"), module_path, name, odd, skip=reason))
                    continue
                n, k = linear_shape(module)
                if target.index is None:
                    base = name.removesuffix(".weight")
                else:
                    leaf = module_path.rpartition(".")[2]
                    fused_leaf = re.sub(r"\.(gate_up_proj|down_proj)(\.weight)?$", "", name)
                    base = f"{fused_leaf}.{target.index}.{leaf}"
                skip = ""
                if module is output:
                    skip = "output embedding (lm_head)"
                elif _ROUTER.search(module_path):
                    skip = "router"
                found.append(
                    Site(
                        base,
                        module_path,
                        name,
                        (n, k),
                        conv1d,
                        target.index,
                        target.rows,
                        self.layer_index(module_path),
                        skip,
                    )
                )
        for name, shape in shapes.items():  # experts that could not be taken apart
            parent = self.rename(name).rpartition(".")[0]
            if len(shape) == 3 and (why := self.fused_experts.get(parent)):
                found.append(Site(name, parent, name, (int(shape[1]), int(shape[2])), skip=why))
        return found

    def _odd_weight(self, module_path: str, name: str, shape: tuple[int, ...]) -> str:
        """Reason to list a 2-D weight that is no linear layer although it multiplies like one."""
        if (
            len(shape) == 2
            and _ROUTER.search(module_path)
            and not isinstance(self.modules[module_path], nn.Embedding)
        ):
            return "router"
        return ""

    def check_complete(self, names: Iterable[str], covered: Iterable[str] = ()) -> list[str]:
        """Refuse a checkpoint that lacks tensors or holds layers the config denies.

        `names`: checkpoint tensor names with dense content; `covered`: parameters filled otherwise
        (quantized layers). Returns the names the model has no place for (carried over, reported).
        """
        filled = set(covered)
        unexpected = []
        for name in names:
            param = self.resolve(name)
            if param is not None:
                if param in filled:
                    raise CheckpointError(
                        f"two tensors of the checkpoint fill {param!r} (one is {name!r})",
                        hint="Remove one of them.",
                    )
                filled.add(param)
                continue
            renamed = self.rename(name)
            fused = re.match(r"^(.*\.experts)\.(gate_up_proj|down_proj)(\.weight)?$", renamed)
            if fused:
                leaves = ("gate_proj", "up_proj") if fused[2] == "gate_up_proj" else ("down_proj",)
                prefix = tuple(f"{p}{fused[1]}." for p in ("", self.base_prefix + "."))
                hits = [p for p in self.params if p.startswith(prefix) and p.split(".")[-2] in leaves]
                if hits:
                    filled.update(hits)
                    continue
            unexpected.append(name)
        groups: dict[str, set[str]] = {}
        for names_tied in self.tied:
            for one in names_tied:
                groups[one] = names_tied
        missing = [p for p in self.params if p not in filled and not (groups.get(p, set()) & filled)]
        if missing:
            raise CheckpointError(
                f"tensor {missing[0]!r} is missing from the checkpoint"
                + (f" (and {len(missing) - 1} more)" if missing[1:] else ""),
                hint="config.json asks for it; download the checkpoint again or repair its index.",
            )
        ignored = [
            re.compile(p) for p in (getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ())
        ]
        for name in unexpected:
            layer = self._denied_layer(name)
            if layer is not None and not any(p.search(self.rename(name)) or p.search(name) for p in ignored):
                raise ConfigError(
                    f"config.json promises {self.num_layers()} layers, but there is a layer {layer} ({name!r})",
                    hint="Give the config that belongs to these weights.",
                )
        return unexpected

    def _denied_layer(self, name: str) -> int | None:
        if not self.layers_path:
            return None
        renamed = self.rename(name)
        for candidate in (renamed, f"{self.base_prefix}.{renamed}"):
            match = re.match(re.escape(self.layers_path) + r"\.(\d+)\.", candidate)
            if match and int(match[1]) >= self.num_layers():
                return int(match[1])
        return None


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of an nn.Linear or a Conv1D."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)


def _layers_path(model: nn.Module, hf_config: Any) -> str | None:
    """Path of the stack of decoder (or encoder) layers: the heaviest ModuleList of the right length."""
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    count = getattr(text, "num_hidden_layers", None)
    best, weight = None, 0
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and (count is None or len(module) == count):
            size = sum(p.numel() for p in module.parameters())
            if size > weight:
                best, weight = path, size
    return best


def _output_embedding(model: Any) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if get else None
    except NotImplementedError:
        return None


def _tied_names(model: Any) -> list[set[str]]:
    """Groups of parameter names that share one tensor once weights are tied."""
    tied = getattr(model, "all_tied_weights_keys", None)
    groups: list[set[str]] = []
    for a, b in (tied or {}).items():
        for group in groups:
            if a in group or b in group:
                group.update((a, b))
                break
        else:
            groups.append({a, b})
    by_id: dict[int, set[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(param), set()).add(name)
    groups.extend(names for names in by_id.values() if len(names) > 1)
    return groups
