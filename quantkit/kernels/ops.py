"""The torch ops: schemas, shapes, gradients. Which code runs is `quantkit.kernels.dispatch`'s business.

    quantkit::affine_linear(x, codes, scale, zero, bias?, perm?, bits, group_size, activation?)   [..., N]
    quantkit::codebook_linear(x, codes, scale, lut, bias?, out_features, block_size)              [..., N]
    quantkit::float8_linear(x, codes, scale, bias?, block_n, block_k, activation?, input_scale?)  [..., N]

with `x [..., K]` in float16, bfloat16 or float32 (float64 through the reference), and tensors as
`quantkit.encoding` lays them out. Each has two companions: `*_linear_backward(grad, ...) -> dx [..., K]`,
and `dequantize_*(..., dtype) -> W [N, K]`.

`affine_fused_linear` adds what surrounds a product when a model decodes (inference only, no gradient):
RMS normalization of the input, a gate (silu(y[:N/2]) * y[N/2:]), a residual.

Gradients: of `x` (dx = dy @ W, straight through a rounding of activations) and of `bias`. Packed tensors
have none: a quantized base is frozen, and adapters train beside it. dx is itself differentiable.

The ops are opaque to torch.compile, so the choice of a kernel by M happens at run time; shapes are
symbolic in the fakes, so M may be dynamic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels import dispatch, reference

_AFFINE = "Tensor codes, Tensor scale, Tensor zero"
_CODEBOOK = "Tensor codes, Tensor scale, Tensor lut"
_FLOAT8 = "Tensor codes, Tensor scale"

SCHEMAS = {
    "affine_linear": f"(Tensor x, {_AFFINE}, Tensor? bias, Tensor? perm, int bits, int group_size, "
    "str? activation) -> Tensor",
    "affine_fused_linear": f"(Tensor x, {_AFFINE}, Tensor? bias, Tensor? perm, Tensor? residual, "
    "Tensor? norm_weight, float norm_eps, bool gated, int bits, int group_size) -> Tensor",
    "affine_linear_backward": f"(Tensor grad, {_AFFINE}, Tensor? perm, int bits, int group_size, "
    "SymInt in_features) -> Tensor",
    "dequantize_affine": f"({_AFFINE}, Tensor? perm, int bits, int group_size, SymInt in_features, "
    "ScalarType dtype) -> Tensor",
    "codebook_linear": f"(Tensor x, {_CODEBOOK}, Tensor? bias, SymInt out_features, int block_size) -> Tensor",
    "codebook_linear_backward": f"(Tensor grad, {_CODEBOOK}, SymInt in_features, int block_size) -> Tensor",
    "dequantize_codebook": f"({_CODEBOOK}, SymInt out_features, SymInt in_features, int block_size, "
    "ScalarType dtype) -> Tensor",
    "float8_linear": f"(Tensor x, {_FLOAT8}, Tensor? bias, int block_n, int block_k, str? activation, "
    "Tensor? input_scale) -> Tensor",
    "float8_linear_backward": f"(Tensor grad, {_FLOAT8}, int block_n, int block_k) -> Tensor",
    "dequantize_float8": f"({_FLOAT8}, int block_n, int block_k, ScalarType dtype) -> Tensor",
}


class Op:
    """A custom op, and a short cut past torch's dispatcher for plain eager calls.

    The dispatcher costs about 10 us a call, as much as a small product. Where it has nothing to do (no
    gradient wanted, no tracing, no mode, transform, profiler or tensor subclass around) the implementation
    is called at once; the result is the same.
    """

    def __init__(self, name: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
        self.name, self._run = name, run
        self.definition = torch.library.custom_op(
            f"quantkit::{name}", run, mutates_args=(), schema=SCHEMAS[name]
        )
        self.definition.register_fake(fake)
        self.register_autograd = self.definition.register_autograd

    def __call__(self, *args: Any) -> Tensor:
        if _is_compiling() or not _plain(args):
            out: Tensor = self.definition(*args)
            return out
        return self._run(*args)


# Looked up once: after a product on a CPU none of torch's large module dictionaries is in the cache.
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state
_profiling = torch._C._autograd._profiler_enabled
_forward_ad = torch.autograd.forward_ad
_Parameter = torch.nn.Parameter
#: Asked before `isinstance`, which Tensor's metaclass makes slow for what is no tensor.
_WITHOUT_TENSORS = frozenset({type(None), int, float, bool, str})


def _plain(args: tuple[Any, ...]) -> bool:
    """May a call with `args` pass the dispatcher by?"""
    gradients = _grad_enabled()
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is _Parameter:
            if (gradients and a.requires_grad) or a.is_meta:
                return False
        elif kind not in _WITHOUT_TENSORS and isinstance(a, Tensor):
            return False
    return not (
        _dispatch_modes()
        or _function_modes()
        or _transform() is not None
        or _tracing_state() is not None
        or _forward_ad._current_level >= 0
        or _profiling()
    )


def _define(name: str, fake: Callable[..., Tensor]) -> Op:
    """A custom op that asks the dispatcher for a backend and falls back on its twin in `reference`."""
    twin = getattr(reference, name)

    def run(*args: Any) -> Tensor:
        kernel = dispatch.implementation(name, args[0].device.type)
        if kernel is not None:
            try:
                out = kernel(*args)
            except Exception as error:
                if not dispatch.launch_failed(name, error):
                    raise
                out = NotImplemented
            if out is not NotImplemented:
                return out
        return twin(*args)

    return Op(name, run, fake)


def _rows(x: Tensor, columns: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns))


affine_linear = _define("affine_linear", lambda x, codes, *_: _rows(x, codes.shape[0]))
affine_fused_linear = _define(
    "affine_fused_linear",
    lambda x, codes, *args: _rows(x, codes.shape[0] // 2 if args[-3] else codes.shape[0]),
)
affine_linear_backward = _define("affine_linear_backward", lambda grad, *args: _rows(grad, args[-1]))
dequantize_affine = _define(
    "dequantize_affine", lambda codes, *args: codes.new_empty((codes.shape[0], args[-2]), dtype=args[-1])
)
codebook_linear = _define("codebook_linear", lambda x, *args: _rows(x, args[-2]))
codebook_linear_backward = _define("codebook_linear_backward", lambda grad, *args: _rows(grad, args[-2]))
dequantize_codebook = _define(
    "dequantize_codebook", lambda codes, *args: codes.new_empty((args[2], args[3]), dtype=args[-1])
)
float8_linear = _define("float8_linear", lambda x, codes, *_: _rows(x, codes.shape[0]))
float8_linear_backward = _define(
    "float8_linear_backward", lambda grad, codes, *_: _rows(grad, codes.shape[1])
)
dequantize_float8 = _define("dequantize_float8", lambda codes, *args: torch.empty_like(codes, dtype=args[-1]))


def _sum_to_bias(grad: Tensor, needed: bool) -> Tensor | None:
    return grad.flatten(0, -2).sum(0) if needed and grad.dim() > 1 else (grad if needed else None)


def _register_affine_gradient() -> None:
    def keep(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        x, codes, scale, zero, _, perm, ctx.bits, ctx.group_size, _ = inputs
        ctx.in_features = x.shape[-1]
        ctx.save_for_backward(codes, scale, zero, perm)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx = None
        if ctx.needs_input_grad[0]:
            packed = (*ctx.saved_tensors, ctx.bits, ctx.group_size)
            dx = affine_linear_backward(grad, *packed, ctx.in_features)
        return (dx, None, None, None, _sum_to_bias(grad, ctx.needs_input_grad[4]), None, None, None, None)

    def keep_second(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        _, codes, scale, zero, perm, ctx.bits, ctx.group_size, _ = inputs
        ctx.save_for_backward(codes, scale, zero, perm)

    def second(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, zero, perm = ctx.saved_tensors
        out = affine_linear(grad, codes, scale, zero, None, perm, ctx.bits, ctx.group_size, None)
        return (out, None, None, None, None, None, None, None)

    affine_linear.register_autograd(backward, setup_context=keep)
    affine_linear_backward.register_autograd(second, setup_context=keep_second)


def _register_codebook_gradient() -> None:
    def keep(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        x, codes, scale, lut, _, _, ctx.block_size = inputs
        ctx.in_features = x.shape[-1]
        ctx.save_for_backward(codes, scale, lut)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx = None
        if ctx.needs_input_grad[0]:
            dx = codebook_linear_backward(grad, *ctx.saved_tensors, ctx.in_features, ctx.block_size)
        return (dx, None, None, None, _sum_to_bias(grad, ctx.needs_input_grad[4]), None, None)

    def keep_second(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        grad, codes, scale, lut, _, ctx.block_size = inputs
        ctx.out_features = grad.shape[-1]
        ctx.save_for_backward(codes, scale, lut)

    def second(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out = codebook_linear(grad, *ctx.saved_tensors, None, ctx.out_features, ctx.block_size)
        return (out, None, None, None, None, None)

    codebook_linear.register_autograd(backward, setup_context=keep)
    codebook_linear_backward.register_autograd(second, setup_context=keep_second)


def _register_float8_gradient() -> None:
    def keep(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        _, codes, scale, _, ctx.block_n, ctx.block_k, _, _ = inputs
        ctx.save_for_backward(codes, scale)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx = None
        if ctx.needs_input_grad[0]:
            dx = float8_linear_backward(grad, *ctx.saved_tensors, ctx.block_n, ctx.block_k)
        return (dx, None, None, _sum_to_bias(grad, ctx.needs_input_grad[3]), None, None, None, None)

    def keep_second(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        _, codes, scale, ctx.block_n, ctx.block_k = inputs
        ctx.save_for_backward(codes, scale)

    def second(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out = float8_linear(grad, *ctx.saved_tensors, None, ctx.block_n, ctx.block_k, None, None)
        return (out, None, None, None, None)

    float8_linear.register_autograd(backward, setup_context=keep)
    float8_linear_backward.register_autograd(second, setup_context=keep_second)


_register_affine_gradient()
_register_codebook_gradient()
_register_float8_gradient()
