"""`QuantLinear`: a linear layer whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantkit.encoding import Activation, Affine, Codebook, PackedWeight
from quantkit.errors import UsageError, did_you_mean
from quantkit.kernels import ops


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
        self.cpu_activation: Activation | None = None  # set by `set_cpu_activations`
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
        # ("meta" has no autocast to ask; torch.amp.is_autocast_available is no answer inside torch.compile.)
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # what F.linear does under autocast
        if x.shape[-1] != self.in_features:
            raise UsageError(f"the input has {x.shape[-1]} features; this layer takes {self.in_features}")
        bias = None if self.bias is None else self.bias.to(x.dtype)
        enc, codes, scale = self.encoding, self.codes, self.scale
        if isinstance(enc, Affine):
            perm = getattr(self, "perm", None)
            activation = self.activation
            if activation is None and x.device.type == "cpu":
                activation = self.cpu_activation
            return ops.affine_linear(
                x, codes, scale, self.zero, bias, perm, enc.bits, enc.group_size, activation
            )
        if isinstance(enc, Codebook):
            return ops.codebook_linear(x, codes, scale, self.lut, bias, self.out_features, enc.block_size)
        input_scale = getattr(self, "input_scale", None)
        return ops.float8_linear(x, codes, scale, bias, *enc.block, self.activation, input_scale)

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


#: How a CPU computes affine layers whose layout does not say how inputs are rounded.
CPU_ACTIVATIONS: dict[str, Activation | None] = {"exact": None, "int8": "int8_block"}


def set_cpu_activations(model: nn.Module, mode: str) -> int:
    """Choose how affine layers of `model` treat activations while on a CPU; returns how many layers it set.

    "exact" (the default) rounds none. "int8" rounds each block of up to 128 inputs to int8
    (`kernels.reference.activation_block`), which onnxruntime computes several times faster; an error of
    about half a percent of the layer's output. Other devices, NF4, fp8 and BitNet layers are not affected.
    """
    if mode not in CPU_ACTIVATIONS:
        known = list(CPU_ACTIVATIONS)
        raise UsageError(f"unknown cpu_activations {mode!r}", hint=did_you_mean(mode, known))
    layers = [m for m in model.modules() if isinstance(m, QuantLinear) and isinstance(m.encoding, Affine)]
    for layer in layers:
        layer.cpu_activation = CPU_ACTIVATIONS[mode]
    return len(layers)


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
