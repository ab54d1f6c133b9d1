"""Exported kernels on a GPU: without Triton against the JIT kernels and float64, then the C example.

    PYTHONPATH=. python scripts/check_kernels_gpu.py              builds for the GPU that is here and checks
    PYTHONPATH=. python scripts/check_kernels_gpu.py build DIR -t sm_90       elsewhere, without a GPU
    PYTHONPATH=. python scripts/check_kernels_gpu.py check DIR                only checks such a directory
    PYTHONPATH=. python scripts/check_kernels_gpu.py aoti [--formats hqq nf4]  only AOTInductor for CUDA

One module holds a layer per encoding; `--to kernels` exports it. A child process in which importing Triton
fails loads the binaries through `quantkit.export.aot`. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from quantkit.progress import NullProgress

ROOT = Path(__file__).resolve().parents[1]
ROWS = (1, 2, 3, 7, 16, 64, 100, 300)
CHILD = """
import sys
sys.modules["triton"] = None  # importing it raises
sys.path.insert(0, sys.argv[1])
import time, torch
from quantkit.export import aot
folder, inputs, outputs = sys.argv[2:]
kernels = aot.load(folder)
results = {}
for (name, rows), x in torch.load(inputs).items():
    x = x.to("cuda")
    results[name, rows] = kernels.linear(name, x).cpu()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        kernels.linear(name, x)
    torch.cuda.synchronize()
    results[name, rows, "us"] = (time.perf_counter() - start) / 50 * 1e6
assert not any(m == "triton" or m.startswith("triton.") for m in sys.modules if sys.modules[m] is not None)
torch.save(results, outputs)
"""


def layers() -> torch.nn.Module:
    """Random packed layers, the same on every machine."""
    from quantkit.encoding import Codebook, Float8, PackedWeight, pack_affine
    from quantkit.linear import QuantLinear

    torch.manual_seed(0)

    def affine(n: int, k: int, bits: int, group: int, **more: object) -> PackedWeight:
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
        groups = math.ceil(k / group)
        scale = (torch.rand(n, groups) * 0.02 + 0.005).half()
        zero = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8)
        return pack_affine(codes, scale, zero, bits, group, **more)

    def ternary(n: int, k: int) -> PackedWeight:
        codes = torch.randint(0, 3, (n, k), dtype=torch.uint8)
        one = torch.ones(n, 1, dtype=torch.uint8)
        return pack_affine(codes, torch.full((n, 1), 0.03), one, 2, k, activation="int8_token")

    n, k = 4096, 4096
    lut = torch.tensor([-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609,
                        0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0])  # fmt: skip
    nf4 = PackedWeight(
        Codebook(4, 64), (n, k), torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8),
        torch.rand(n * k // 64) * 0.05, lut=lut,
    )  # fmt: skip
    dense = torch.randn(n, k).clamp(-400, 400).to(torch.float8_e4m3fn).view(torch.uint8)
    fp8 = PackedWeight(Float8((128, 128)), (n, k), dense, torch.rand(n // 128, k // 128) * 0.02 + 0.01)
    model = torch.nn.Module()
    model.add_module("affine4_g128", QuantLinear(affine(n, k, 4, 128)))
    act_order = affine(1000, 640, 4, 64, perm=torch.randperm(640))
    model.add_module("affine4_act_order_bias", QuantLinear(act_order, torch.randn(1000).half()))
    model.add_module("ternary_int8", QuantLinear(ternary(2048, 2560)))
    model.add_module("nf4", QuantLinear(nf4))
    model.add_module("fp8_block", QuantLinear(replace(fp8, activation="fp8_group128")))
    return model


def build(folder: Path, targets: list[str]) -> None:
    from quantkit.export import kernel_export

    begin = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    counts = kernel_export.write(layers(), folder, targets, torch.float16, lambda file: None)
    print(
        f"built {sum(counts.values())} binaries for {' '.join(targets)} in {time.perf_counter() - begin:.0f} s"
    )


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def check(folder: Path) -> int:
    from quantkit.export.kernel_manifest import read_manifest
    from quantkit.kernels import reference

    manifest = read_manifest(folder)
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name()}, built with Triton {manifest['triton']}"
    )
    torch.manual_seed(1)
    model = layers()
    names = [name for name, _ in model.named_children()]
    inputs = {
        (name, rows): torch.randn(rows, getattr(model, name).in_features).half()
        for name in names
        for rows in ROWS
    }
    with tempfile.TemporaryDirectory() as scratch:
        given, made = f"{scratch}/x.pt", f"{scratch}/y.pt"
        torch.save(inputs, given)
        subprocess.run([sys.executable, "-c", CHILD, str(ROOT), str(folder), given, made], check=True)
        results = torch.load(made)
        lines, failures = [], 0
        for (name, rows), x in inputs.items():
            layer = getattr(model, name).to("cuda")
            on_gpu = x.to("cuda")
            jit = layer(on_gpu).cpu()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                layer(on_gpu)
            torch.cuda.synchronize()
            jit_us = (time.perf_counter() - start) / 50 * 1e6
            exact = reference.quant_linear(on_gpu.double(), layer.packed, None).cpu()
            if layer.bias is not None:
                exact = exact + layer.bias.cpu().double()
            got = results[name, rows]
            to_exact, to_jit, jit_error = relative(got, exact), relative(got, jit), relative(jit, exact)
            # No worse than the JIT kernel, which is the same code (other summation orders where BLAS is used).
            good = to_exact <= max(1.2 * jit_error, 1e-6) and math.isfinite(to_exact)
            failures += not good
            lines.append(
                f"{name:24} {rows:4}  {to_exact:9.2e} {jit_error:9.2e} {to_jit:9.2e}"
                f"  {results[name, rows, 'us']:7.0f} {jit_us:7.0f}  {'ok' if good else 'DIFFERS'}"
            )
        c_lines, c_failures = c_example(folder, manifest, model, inputs, results, Path(scratch))
    print(f"{'layer':24} rows  float64    jit-f64   jit        us aot  us jit")
    print("\n".join([*lines, *c_lines]))
    print("FAILED" if failures + c_failures else "all agree")
    return int(bool(failures + c_failures))


def cuda_flags() -> list[str]:
    """Where cuda.h is (the toolkit's, or Triton's copy), and the driver's library that torch has loaded."""
    import importlib.util

    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    found = [f"{p}/include" for p in places if p and Path(p, "include/cuda.h").is_file()]
    spec = importlib.util.find_spec("triton")
    if not found and spec and spec.origin:
        found = [str(Path(spec.origin).parent / "backends/nvidia/include")]
    maps = Path("/proc/self/maps").read_text().split()
    library = next((word for word in maps if "/libcuda.so" in word), "-lcuda")
    return [f"-I{found[0]}", library] if found else [library]


def c_example(folder, manifest, model, inputs, results, scratch: Path) -> tuple[list[str], int]:  # type: ignore[no-untyped-def]
    major, minor = torch.cuda.get_device_capability()
    program = scratch / "multiply"
    source = ROOT / "examples/run-kernels-c/multiply.c"
    command = ["gcc", "-O1", "-Wall", f"-I{folder}/sm_{major}{minor}", str(source), "-o", str(program)]
    subprocess.run([*command, *cuda_flags()], check=True)
    lines, failures = [], 0
    for (name, rows), x in inputs.items():
        if rows not in (1, 16, 300):
            continue
        raw = x.numpy().tobytes()
        done = subprocess.run([str(program), str(folder), name, str(rows)], input=raw, capture_output=True)
        if done.returncode:
            lines.append(f"{name:24} {rows:4}  C example: {done.stderr.decode()[-200:]}")
            failures += 1
            continue
        got = torch.frombuffer(bytearray(done.stdout), dtype=torch.float16).view(rows, -1)
        error = relative(got, results[name, rows])
        # Beyond the last plan the C program goes on in pieces; Python dequantizes and calls BLAS.
        good = error == 0 if rows <= 128 else error < 2e-3
        failures += not good
        lines.append(
            f"{name:24} {rows:4}  C example against Python: {error:.1e}  {'ok' if good else 'DIFFERS'}"
        )
    return lines, failures


class Steps(NullProgress):
    """Prints what an export is doing as it begins, with the time: compiling takes minutes on a new machine."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()

    def stage(self, text: str) -> None:
        print(f"  {time.perf_counter() - self.begin:5.0f} s  {text}", flush=True)


#: Compile as little as possible, as quickly as possible: what is checked is right or wrong, not fast.
QUICK = {
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
    "triton.autotune_pointwise": False,
}


def aoti(formats: list[str], device: str) -> int:
    """One layer of a tiny random Llama, compiled by AOTInductor; the export's own proof decides."""
    import torch._inductor.config
    import transformers

    import quantkit
    from quantkit.errors import QuantkitError

    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    known = torch._inductor.config.get_config_copy()
    quick = {name: value for name, value in QUICK.items() if name in known}
    failures = 0
    with tempfile.TemporaryDirectory() as folder, torch._inductor.config.patch(quick):
        transformers.LlamaForCausalLM(config).half().save_pretrained(f"{folder}/source")
        for name in formats:
            begin, progress = time.perf_counter(), Steps()
            quantkit.convert(f"{folder}/source", f"{folder}/{name}", format=name)
            progress.stage("converted")
            try:
                proof = quantkit.export(
                    f"{folder}/{name}", f"{folder}/{name}-aoti", to="aoti", device=device, progress=progress
                ).proof
                said = f"error {proof.max_error:.1e} of logits up to {proof.largest_logit:.2f}  ok"
                said += f"  {proof.artifact_tokens_per_second:.0f} tokens/s"
            except QuantkitError as error:
                failures, said = failures + 1, f"FAILED: {error}"
            print(f"aoti {device}, {name:4} {time.perf_counter() - begin:4.0f} s  {said}", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", choices=["build", "check", "aoti"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("-t", "--target", action="append")
    parser.add_argument("--formats", nargs="+", default=["hqq"], help="aoti: hqq, nf4, fp8, ...")
    parser.add_argument("--device", default="cuda", help="aoti: cuda, or cpu to try this script")
    options = parser.parse_args()
    if options.what == "build":
        build(options.folder, options.target or ["sm_90"])
        return 0
    if options.what == "check":
        return check(options.folder)
    failures = 0
    if options.what is None:
        with tempfile.TemporaryDirectory() as folder:
            major, minor = torch.cuda.get_device_capability()
            build(Path(folder), options.target or [f"sm_{major}{minor}"])
            failures += check(Path(folder))
    failures += aoti(options.formats, options.device)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
