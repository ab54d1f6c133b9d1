"""What only a device can show of the ops, in about a minute: one line per check, exit code 1 if one fails.

    python scripts/check_ops_gpu.py            # on the accelerator
    python scripts/check_ops_gpu.py --device cpu    # the checks that a CPU has

opcheck of every op; torch.compile(fullgraph=True) with dynamic M, under autocast too; CUDA-graph capture and
replay on new inputs, without a host sync; host time of a call through the op; dequantize bit for bit against
the reference (and bitsandbytes, where installed, nested absmax included); the fused product of hundreds of rows
(Hopper); BitNet's rule to the last bit; a short LoRA training against the same weights dense and frozen.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.encoding import Affine, Codebook, Float8, PackedWeight, dequantize, pack_affine
from quantkit.kernels import dispatch, ops, reference
from quantkit.kernels.bench_cases import random_weight
from quantkit.linear import QuantLinear

ROOT = Path(__file__).resolve().parents[1]
FORMS = ("affine-4g128", "affine-3g128", "hqq-4g64", "ternary", "nf4", "fp8-block", "fp8-channel-a8")
SHAPE = (512, 1024)


def layer_of(form: str, device: torch.device, shape: tuple[int, int] = SHAPE) -> QuantLinear:
    return QuantLinear(random_weight(form, *shape, device))


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def calls(packed: PackedWeight, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every op of the weight's encoding with arguments."""
    (n, k), device, enc = packed.shape, packed.codes.device, packed.encoding
    x = torch.randn(3, k, device=device, dtype=dtype)
    grad = torch.randn(3, n, device=device, dtype=dtype)
    w: tuple[Any, ...]
    if isinstance(enc, Affine):
        w, o = (packed.codes, packed.scale, packed.zero), (enc.bits, enc.group_size)
        norm = torch.rand(k, device=device, dtype=dtype)
        return [
            (ops.affine_linear, (x, *w, None, packed.perm, *o, packed.activation)),
            (ops.affine_linear_backward, (grad, *w, packed.perm, *o, k)),
            (ops.affine_fused_linear, (x, *w, None, None, None, norm, 1e-5, True, *o)),
            (ops.dequantize_affine, (*w, packed.perm, *o, k, dtype)),
        ]
    if isinstance(enc, Codebook):
        w = (packed.codes, packed.scale, packed.lut)
        return [
            (ops.codebook_linear, (x, *w, None, n, enc.block_size)),
            (ops.codebook_linear_backward, (grad, *w, k, enc.block_size)),
            (ops.dequantize_codebook, (*w, n, k, enc.block_size, dtype)),
        ]
    assert isinstance(enc, Float8)
    w = (packed.codes, packed.scale)
    return [
        (ops.float8_linear, (x, *w, None, *enc.block, packed.activation, packed.input_scale)),
        (ops.float8_linear_backward, (grad, *w, *enc.block)),
        (ops.dequantize_float8, (*w, *enc.block, dtype)),
    ]


def check_opcheck(device: torch.device) -> str:
    count = 0
    for form in FORMS:
        for op, arguments in calls(random_weight(form, 64, 256, device), torch.float16):
            arguments = tuple(
                a.requires_grad_() if i == 0 and isinstance(a, Tensor) and a.is_floating_point() else a
                for i, a in enumerate(arguments)
            )
            fused = op is ops.affine_fused_linear  # inference only: it has no gradient to check
            tests = ("test_schema", "test_faketensor") if fused else None
            torch.library.opcheck(op.definition, arguments, **({"test_utils": tests} if tests else {}))
            count += 1
    return f"{count} ops with arguments"


def check_compile(device: torch.device) -> str:
    """One graph, M dynamic; with and without autocast, forward and backward."""
    worst = 0.0
    for form in FORMS:
        layer = layer_of(form, device)
        for autocast in (False, True):
            torch._dynamo.reset()
            # Inductor for one layer of each op; what differs between formats is inside the op.
            backend = "inductor" if form in ("affine-4g128", "nf4", "fp8-block") else "aot_eager"
            compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
            for rows in (1, 2, 9, 33):
                x = torch.randn(
                    rows, SHAPE[1], device=device, dtype=torch.float32 if autocast else torch.bfloat16
                )
                x.requires_grad_()
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                    got, want = compiled(x), layer(x)
                assert got.dtype == want.dtype == torch.bfloat16
                (dx,) = torch.autograd.grad(got.float().square().sum(), x)
                (expected,) = torch.autograd.grad(want.float().square().sum(), x)
                worst = max(worst, relative(got, want), relative(dx, expected))
    assert worst < 1e-2, worst
    return f"{len(FORMS)} formats, M = 1, 2, 9, 33, autocast on and off; worst difference {worst:.1e}"


def check_graph(device: torch.device) -> str:
    """Captured, replayed on inputs that the capture did not see: the same bits as eager; no host sync."""
    backend: Any = torch.get_device_module(device)
    if not hasattr(backend, "CUDAGraph"):
        return "skipped: no graphs on this device"
    for form in FORMS:
        layer = layer_of(form, device)
        for rows in (1, 8, 40, 300):
            static = torch.randn(rows, SHAPE[1], device=device, dtype=torch.bfloat16)
            layer(static)
            backend.synchronize()
            backend.set_sync_debug_mode("error")
            try:
                layer(static)
                graph = backend.CUDAGraph()
            finally:
                backend.set_sync_debug_mode("default")
            with backend.graph(graph):
                out = layer(static)
            for _ in range(2):
                fresh = torch.randn_like(static)
                static.copy_(fresh)
                graph.replay()
                assert torch.equal(out, layer(fresh)), (form, rows)
    return f"{len(FORMS)} formats, M = 1, 8, 40, 300: replay equals eager bit for bit, no sync"


def check_host_time(device: torch.device) -> str:
    """Microseconds until a call returns (launches are asynchronous), through the layer and the bare backend."""
    formats = ("affine-4g128", "nf4", "fp8-block")
    return "us per call: " + "; ".join(f"{form} {_host_times(form, device)}" for form in formats)


def _host_times(form: str, device: torch.device) -> str:
    sync = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    layer = layer_of(form, device)
    x = torch.randn(
        1, SHAPE[1], device=device, dtype=torch.bfloat16 if device.type != "cpu" else torch.float32
    )
    op, arguments = calls(layer.packed, x.dtype)[0]
    arguments = (x, *arguments[1:])
    kernel = dispatch.implementation(op.name, device.type)
    times = {}
    for label, call in (
        ("layer", lambda: layer(x)),
        ("op", lambda: op(*arguments)),
        ("op through the dispatcher", lambda: op.definition(*arguments)),
        ("kernel", (lambda: kernel(*arguments)) if kernel else (lambda: None)),
    ):
        with torch.no_grad():
            samples = []
            for _ in range(20):
                sync()
                start = time.perf_counter()
                for _ in range(20):
                    call()
                samples.append((time.perf_counter() - start) / 20)
        times[label] = statistics.median(samples) * 1e6
    return ", ".join(f"{k} {v:.0f}" for k, v in times.items())


def check_dequantize(device: torch.device) -> str:
    """Bit for bit: every format against the reference; NF4 and FP4 against bitsandbytes too."""
    count = 0
    for form in FORMS:
        for shape in (SHAPE, (63, 1000)):
            if form == "affine-3g128" and shape[1] % 8:
                continue
            packed = random_weight(form, *shape, device)
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                op, arguments = calls(packed, dtype)[-1]
                with dispatch.use_reference():
                    want = op(*arguments)
                assert torch.equal(op(*arguments), want), (form, shape, dtype)
                count += 1
    return f"{count} cases equal the reference; " + _against_bitsandbytes(device)


def _against_bitsandbytes(device: torch.device) -> str:
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    from bitsandbytes import functional as owner

    from quantkit.formats.nf4 import NF4, NF4Config

    count = 0
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                weight = torch.randn(96, 320, device=device).to(dtype)
                bytes_, state = owner.quantize_4bit(
                    weight, blocksize=64, compress_statistics=nested, quant_type=kind
                )
                stored = {"weight": bytes_} | {
                    f"weight.{k}": v for k, v in state.as_dict(packed=True).items()
                }
                stored = {k: v.cpu() for k, v in stored.items()}
                config = NF4Config(quant_type=kind, double_quant=nested, compute_dtype=str(dtype)[6:])
                packed = NF4().from_checkpoint(stored, config, (96, 320)).to(device)
                op, arguments = calls(packed, dtype)[-1]
                want = owner.dequantize_4bit(bytes_, state)
                assert torch.equal(op(*arguments), want), (kind, nested, dtype)
                count += 1
    return f"{count} cases equal bitsandbytes (nested absmax included)"


def check_ternary(device: torch.device) -> str:
    """W1.58A8: integers times both scales, recomputed in int64 on the host; the same float32 bits."""
    for rows in (1, 5, 17, 64):
        k = 1000
        codes = torch.randint(0, 3, (63, k), dtype=torch.uint8)
        scale = torch.rand(63, 1) + 0.5
        packed = pack_affine(
            codes, scale, torch.ones(63, 1, dtype=torch.uint8), 2, k, activation="int8_token"
        )
        x = torch.randn(rows, k)
        got = QuantLinear(packed).to(device)(x.to(device)).cpu()
        s = 127.0 / x.abs().amax(-1, keepdim=True)
        integers = (x * s).round().to(torch.int64) @ (codes.to(torch.int64) - 1).T
        want = integers.float() * (scale[:, 0] / s)
        assert torch.equal(got, want), rows
    return "M = 1, 5, 17, 64: the same bits as int64 sums on the host"


class Adapter(nn.Module):
    """LoRA: y = base(x) + B A x, B zero at the start."""

    def __init__(self, base: nn.Module, n: int, k: int, device: torch.device, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base = base
        self.down = nn.Parameter((torch.randn(4, k, generator=generator) / k**0.5).to(device))
        self.up = nn.Parameter(torch.zeros(n, 4, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Dense(nn.Module):
    """The same layer in plain torch: dense frozen weights, straight-through rounding of inputs."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.packed, self.bias = layer.packed, layer.bias
        self.weight = dequantize(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        rounded = x + (reference.round_activation(x, self.packed) - x).detach()
        return nn.functional.linear(rounded, self.weight, self.bias)


def _train(model: Any, tokens: Tensor, dense: bool, steps: int = 6) -> list[float]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, QuantLinear)]
    for i, (name, layer) in enumerate(layers):
        parent, _, leaf = name.rpartition(".")
        base = Dense(layer) if dense else layer
        adapter = Adapter(base, layer.out_features, layer.in_features, tokens.device, i)
        setattr(model.get_submodule(parent), leaf, adapter)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    history = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    return history


def check_lora(device: torch.device) -> str:
    import quantkit
    from quantkit.load import load_tokenizer

    example = ROOT / "examples" / "pydoc-qwen2-3m"
    text = Path(quantkit.__file__).read_text(encoding="utf-8")
    tokens = torch.tensor([load_tokenizer(example)(text)["input_ids"][:96]], device=device)
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for form in ("nf4", "hqq", "fp8", "ternary"):
            path = Path(folder) / form
            quantkit.convert(example, path, format=form, device="cpu", samples=2, seqlen=64)
            runs = [
                _train(quantkit.load(path, device=device, dtype=torch.float32), tokens, dense)
                for dense in (False, True)
            ]
            apart = max(abs(a - b) / b for a, b in zip(*runs))
            assert runs[0][-1] < 0.95 * runs[0][0], (form, runs[0])
            # Where inputs are rounded, a sum's last bit decides a tie now and then.
            assert apart < (2e-2 if form in ("fp8", "ternary") else 2e-3), (form, apart)
            parts.append(f"{form} {runs[0][0]:.2f} -> {runs[0][-1]:.2f} ({apart:.0e} from dense)")
    return "; ".join(parts)


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "opcheck": check_opcheck,
    "torch.compile": check_compile,
    "graph capture": check_graph,
    "host time": check_host_time,
    "dequantize": check_dequantize,
    "ternary": check_ternary,
    "LoRA": check_lora,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=None)
    parser.add_argument("--only", choices=list(CHECKS), action="append")
    given = parser.parse_args()
    device = torch.device(given.device) if given.device else torch.accelerator.current_accelerator()
    if device is None:
        print("no accelerator; pass --device cpu for what a CPU has", file=sys.stderr)
        return 2
    lines, failed = [], 0
    for name in given.only or CHECKS:
        start = time.perf_counter()
        try:
            verdict, text = "ok", CHECKS[name](device)
            if text.startswith("skipped"):
                verdict = "-"
        except Exception as error:
            traceback.print_exc()
            verdict, failed = "FAILED", failed + 1
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        lines.append(f"{verdict:6s} {name:14s} {time.perf_counter() - start:5.1f} s  {text}")
        print(lines[-1], flush=True)
    print(f"\n{device}, torch {torch.__version__}")
    print("\n".join(lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
