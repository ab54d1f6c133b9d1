"""`QuantLinear`: a linear layer whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantkit.encoding import PackedWeight
from quantkit.kernels.reference import quant_linear


class QuantLinear(nn.Module):
    """Drop-in for `nn.Linear` holding a `PackedWeight`.

    The packed tensors are frozen Parameters (FSDP2 shards parameters, not buffers) named `codes`,
    `scale`, `zero`, `lut`, `perm`, `input_scale`; integer ones included. `.to(dtype)` moves devices but
    keeps the dtype of every packed tensor: scales are part of the encoding, not of the compute dtype.
    """

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.encoding = packed.encoding
        self.shape = packed.shape
        self.activation = packed.activation
        self.out_features, self.in_features = packed.shape
        self._packed_names = tuple(packed.tensors())
        for name, tensor in packed.tensors().items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def packed(self) -> PackedWeight:
        """The weight as a value; shares storage with the module's parameters."""
        tensors = {name: getattr(self, name).data for name in self._packed_names}
        return PackedWeight(self.encoding, self.shape, activation=self.activation, **tensors)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return quant_linear(x, self.packed, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or not any(tensor is p or tensor is p.data for p in packed):
                return moved
            return tensor.to(moved.device)

        packed = [getattr(self, name) for name in self._packed_names]
        return super()._apply(keep_dtype, recurse)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.encoding}, bias={self.bias is not None}"


def replace_linear(model: nn.Module, path: str, packed: PackedWeight) -> QuantLinear:
    """Put a QuantLinear where the linear layer at `path` was; its bias parameter is kept."""
    old = model.get_submodule(path)
    new = QuantLinear(packed)
    bias = getattr(old, "bias", None)
    new.bias = bias
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
    new.train(old.training)
    return new


def materialize(model: nn.Module, path: str, value: Tensor, *, requires_grad: bool = False) -> None:
    """Replace the parameter or buffer called `path` (usually on the meta device) by `value`."""
    module_path, _, leaf = path.rpartition(".")
    module = model.get_submodule(module_path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=requires_grad)
    else:
        module._buffers[leaf] = value


def meta_tensors(model: nn.Module) -> list[str]:
    """Names of parameters and buffers that still have no memory."""
    everything = (*model.named_parameters(), *model.named_buffers())
    return [name for name, t in everything if t.device == torch.device("meta")]
