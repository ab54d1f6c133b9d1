"""MoE experts as one plain module per expert, so that each is a linear layer like any other.

transformers 5 holds the experts of a layer as two 3-D parameters (`gate_up_proj [E, 2I, H]`,
`down_proj [E, H, I]`). Quantized files, Hessians and kernels are per expert, so quantkit replaces such
a module by `UnfusedExperts`: the same mathematics, with children

    experts.{i}.gate_proj   Linear(H -> I)      rows [0, I) of gate_up_proj[i]
    experts.{i}.up_proj     Linear(H -> I)      rows [I, 2I)
    experts.{i}.down_proj   Linear(I -> H)

which are the names that most checkpoints on the hub use for them anyway.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

#: Checkpoint spellings of an expert's three matrices -> ours (Mixtral: w1 gate, w3 up, w2 down).
EXPERT_LEAVES = {
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}
_PER_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<leaf>\w+)\.(?P<rest>.+)$")


class UnfusedExperts(nn.Module):
    """Routed experts as separate linears; the forward is that of transformers' eager experts.

    Input `hidden_states [T, H]`, `top_k_index [T, k]` (int), `top_k_weights [T, k]`; output `[T, H]`.
    The gating (activation, clamps) is the original module's own `_apply_gate`.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        experts, double, hidden = fused.gate_up_proj.shape  # type: ignore[union-attr,misc]
        self.num_experts = int(experts)
        self.intermediate = int(double) // 2
        self.hidden = int(hidden)
        # Keeps the activation and limits of the original without keeping its weights.
        gate = nn.Module.__new__(type(fused))
        nn.Module.__init__(gate)
        for key, value in vars(fused).items():
            if not key.startswith("_") or key not in vars(gate):
                object.__setattr__(gate, key, value)
        gate.act_fn = fused.act_fn
        object.__setattr__(self, "_gate_owner", gate)  # not a child: owns no parameters
        device = fused.gate_up_proj.device  # type: ignore[union-attr]
        dtype = fused.gate_up_proj.dtype  # type: ignore[union-attr]
        for i in range(self.num_experts):
            expert = nn.Module()
            for leaf, (k, n) in {
                "gate_proj": (self.hidden, self.intermediate),
                "up_proj": (self.hidden, self.intermediate),
                "down_proj": (self.intermediate, self.hidden),
            }.items():
                linear = nn.utils.skip_init(nn.Linear, k, n, bias=False, device=device, dtype=dtype)
                expert.add_module(leaf, linear)
            self.add_module(str(i), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for i in range(self.num_experts):
            token, slot = torch.where(top_k_index == i)
            if token.numel() == 0:
                continue
            expert: Any = getattr(self, str(i))
            x = hidden_states[token]
            gate_up = torch.cat([expert.gate_proj(x), expert.up_proj(x)], dim=-1)
            y = expert.down_proj(self._gate_owner._apply_gate(gate_up))  # type: ignore[operator,union-attr]
            out.index_add_(0, token, (y * top_k_weights[token, slot, None]).to(out.dtype))
        return out


def unfusable(module: nn.Module) -> str | None:
    """None when `module` is a fused experts module that `UnfusedExperts` reproduces, "" when it is
    not an experts module at all, else the reason why it cannot be taken apart."""
    gate_up = getattr(module, "gate_up_proj", None)
    down = getattr(module, "down_proj", None)
    fused = [
        t
        for t in (gate_up, down, getattr(module, "up_proj", None))
        if isinstance(t, nn.Parameter) and t.dim() == 3
    ]
    if not fused:
        return ""
    if gate_up is None or down is None or not getattr(module, "has_gate", True):
        return "experts without a gate are not supported yet"
    if getattr(module, "has_bias", False):
        return "experts with biases are not supported yet"
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        return "transposed or interleaved expert weights are not supported yet"
    if getattr(module, "has_post_expert_norm", False) or not hasattr(module, "_apply_gate"):
        return "experts with a custom forward are not supported yet"
    return None


def unfuse_experts(model: nn.Module) -> dict[str, str]:
    """Replace every fused experts module of `model` in place.

    Returns the experts modules left fused, by path, with the reason.
    """
    refused = {}
    for path, module in list(model.named_modules()):
        reason = unfusable(module)
        if reason is None:
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], UnfusedExperts(module))
        elif reason:
            refused[path] = reason
    return refused


def canonical_expert_name(name: str) -> str:
    """Spell a per-expert tensor name as `UnfusedExperts` does; other names are returned unchanged."""
    match = _PER_EXPERT.match(name)
    if not match or match["leaf"] not in EXPERT_LEAVES:
        return name
    return f"{match['experts']}.{match['index']}.{EXPERT_LEAVES[match['leaf']]}.{match['rest']}"
