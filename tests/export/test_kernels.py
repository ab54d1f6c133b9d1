"""`--to kernels`: binaries, manifest, C header and loader, without a GPU.

A stub of the driver (stub_driver.c) logs what the C example and the Python loader launch, with the parameters
that the binaries ask for; both must be what a fresh recording of the JIT kernels says. Numbers are checked by
following the manifest's plans with Triton's interpreter in place of the driver.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

import quantkit
from quantkit.cli.app import run
from quantkit.errors import CheckpointError, QuantkitError, UsageError
from quantkit.export import aot, elf, kernel_export
from quantkit.export.kernel_manifest import read_manifest, rule_at
from quantkit.kernels import aot as jit_aot
from quantkit.kernels import launch_plan
from quantkit.linear import QuantLinear

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NVIDIA = Path(triton.__file__).parent / "backends/nvidia"
LAYER = "model.layers.0.self_attn.q_proj"
CHILD = """
import sys
sys.modules["triton"] = None  # importing it raises
import torch
from quantkit.export import aot
from quantkit.export.gpu_driver import Driver
from quantkit.export.kernel_manifest import read_manifest
from pathlib import Path
folder, driver, layer, rows = Path(sys.argv[1]), sys.argv[2], sys.argv[3], [int(r) for r in sys.argv[4:]]
kernels = aot.KernelLibrary(folder, read_manifest(folder), "sm_80", Driver("cuda", driver))
for count in rows:
    assert kernels.linear(layer, torch.ones(count, 64, dtype=torch.float16)).shape == (count, 64)
"""


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All quantized layers are 64 x 64, so there is one product to compile."""
    out = tmp_path_factory.mktemp("kernels") / "hqq"
    source = tiny("llama", intermediate_size=64, num_key_value_heads=4)
    quantkit.convert(source, out, format="hqq", options={"bits": 4, "group_size": 32})
    return out


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    out = checkpoint.parent / "out"
    arguments = ["export", str(checkpoint), "--to", "kernels", "-t", "sm_80", "-t", "gfx942", "-o", str(out)]
    assert run([*arguments, "--dtype", "float16"]) == 0
    return out


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stub driver's library."""
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    out = tmp_path_factory.mktemp("stub") / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", f"-I{NVIDIA}/include", str(HERE / "stub_driver.c"), "-o", str(out)]
    subprocess.run(command, check=True)
    return out


def test_the_manifest_describes_the_binaries(exported: Path) -> None:
    import hashlib

    manifest = read_manifest(exported)
    assert manifest["targets"] == ["sm_80", "gfx942"] and len(manifest["products"]) == 1
    assert set(manifest["layers"].values()) == {0} and len(manifest["layers"]) == 14
    for entry in manifest["kernels"]:
        binary = (exported / entry["file"]).read_bytes()
        assert hashlib.sha256(binary).hexdigest() == entry["sha256"]
        types = [kind for _, kind in entry["parameters"]]
        assert entry["parameters"][-2:] == [["global_scratch", "*u8"], ["profile_scratch", "*u8"]]
        elf.check_signature(binary, entry["symbol"], types, cuda=entry["target"] == "sm_80")
        with pytest.raises(QuantkitError, match="takes"):
            elf.check_signature(binary, entry["symbol"], types[:-1], cuda=entry["target"] == "sm_80")
        assert str(ROOT).encode() not in binary, "paths of this machine"
    for target in manifest["targets"]:
        rows = [r["rows"] for r in manifest["products"][0]["plans"][target]["regimes"]]
        assert rows[0][0] == 1 and rows[-1][1] == 128
        assert all(a[1] + 1 == b[0] for a, b in pairwise(rows))
    record = json.loads((exported / "quantkit_export.json").read_text())
    assert record["proof"] is None or record["proof"]["steps"] > 0
    assert (exported / "weights.safetensors").is_file() and not (
        exported / "gfx942/quantkit_kernels.h"
    ).exists()


def test_the_binaries_disassemble(exported: Path) -> None:
    tool = NVIDIA / "bin/nvdisasm"
    if not tool.is_file():
        pytest.skip("no nvdisasm in this Triton")
    products = [e for e in read_manifest(exported)["kernels"] if e["kernel"] == "affine_gemm_kernel"]
    entry = next(e for e in products if e["target"] == "sm_80")
    text = subprocess.run([tool, exported / entry["file"]], capture_output=True, text=True, check=True).stdout
    assert f".text.{entry['symbol']}" in text and "HMMA" in text and "EXIT" in text


def expected_launches(checkpoint: Path, rows: int) -> list[tuple[str, list[int], list[int]]]:
    """(kernel, grid, integer arguments) that a fresh recording of the JIT backend gives."""
    layer = quantkit.load(checkpoint).get_submodule(LAYER)
    assert isinstance(layer, QuantLinear)
    tensors = kernel_export.weight_tensors(layer, torch.float16)
    op, params = kernel_export.operation(layer.packed)
    call = kernel_export._call_of(op, params, tensors, layer.shape, torch.float16)
    recorded = call(rows, jit_aot.parse_target("sm_80"))
    assert not recorded.foreign
    out = []
    for step in recorded.launches:
        numbers = [int(v) for _, v in step.arguments if isinstance(v, int)]
        out.append((step.record.name, list((*step.record.grid, 1, 1)[:3]), numbers))
    return out


def logged(log: Path) -> list[tuple[str, list[int], list[int]]]:
    """The same from the stub's log; hidden pointers must be null, others must not."""
    out = []
    for line in log.read_text().splitlines():
        if not line.startswith("launch"):
            continue
        head, _, tail = line.partition(" : ")
        _, symbol, gx, gy, gz, _, _ = head.split()
        values = [tuple(v.split(":")) for v in tail.split()]
        pointers = [int(v, 16) for size, v in values if size == "8"]
        assert all(p and p % 16 == 0 for p in pointers[:-2]) and pointers[-2:] == [0, 0]
        numbers = [int(v, 16) for size, v in values if size == "4"]
        out.append((symbol, [int(gx), int(gy), int(gz)], numbers))
    return out


def without_eps(launches: list[tuple[str, list[int], list[int]]], extra: int) -> list[Any]:
    """`affine_gemm_kernel` has a float before its integers: `extra` numbers to leave out there."""
    return [(k, g, n[extra:] if k == "affine_gemm_kernel" else n) for k, g, n in launches]


def test_the_loader_launches_what_the_jit_would(
    exported: Path, checkpoint: Path, stub: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    environment = {**os.environ, "QK_STUB_LOG": str(log), "PYTHONPATH": str(ROOT)}
    rows = [1, 5, 40, 77]
    command = [sys.executable, "-c", CHILD, str(exported), str(stub), LAYER, *map(str, rows)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    want = [launch for count in rows for launch in expected_launches(checkpoint, count)]
    assert without_eps(logged(log), 1) == without_eps(want, 0)


@pytest.mark.parametrize("rows", [1, 40, 200])
def test_the_c_example_launches_what_the_jit_would(
    exported: Path, checkpoint: Path, stub: Path, tmp_path: Path, rows: int
) -> None:
    program, log = tmp_path / "multiply", tmp_path / "log"
    source = str(ROOT / "examples/run-kernels-c/multiply.c")
    command = ["gcc", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", source, str(stub)]
    command += [f"-I{exported}/sm_80", f"-I{NVIDIA}/include", "-o", str(program), f"-Wl,-rpath,{stub.parent}"]
    subprocess.run(command, check=True)
    environment = {**os.environ, "QK_STUB_LOG": str(log), "LD_LIBRARY_PATH": str(stub.parent)}
    x = torch.randn(rows, 64).half().numpy().tobytes()
    done = subprocess.run(
        [program, exported, LAYER, str(rows)], input=x, env=environment, capture_output=True
    )
    assert done.returncode == 0 and len(done.stdout) == rows * 64 * 2, done.stderr
    parts = [rows] if rows <= 128 else [128, rows - 128]
    want = [launch for part in parts for launch in expected_launches(checkpoint, part)]
    assert without_eps(logged(log), 1) == without_eps(want, 0)
    # Scratch memory is as large as the plan says: the last allocation, when there is any.
    plan = next(
        r
        for r in read_manifest(exported)["products"][0]["plans"]["sm_80"]["regimes"]
        if min(rows, 128) <= r["rows"][1]
    )
    sizes = [-(-rule_at(rule, min(rows, 128)) // 256) * 256 for rule in plan["scratch"]]
    allocations = [int(line.split()[2]) for line in log.read_text().splitlines() if line.startswith("alloc")]
    assert not sizes or allocations[-1] == sum(sizes)
    wrong = subprocess.run(
        [program, exported, "no.layer", "1"], env=environment, capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "no layer no.layer" in wrong.stderr


@pytest.mark.slow
def test_the_documented_commands_run(checkpoint: Path, stub: Path, tmp_path: Path) -> None:
    """docs/export.md, the shell commands as they stand there; the stub stands in for the driver."""
    page = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    section = page[page.index("## Kernels without the Triton runtime") :]
    commands = section[section.index("```sh\n") + 6 :].split("```")[0]
    assert len(commands.splitlines()) == 3
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "CHECKPOINT").symlink_to(checkpoint)
    (tmp_path / "libcuda.so").symlink_to(stub)
    (tmp_path / "x").write_bytes(torch.randn(1, 64).half().numpy().tobytes())
    environment = {**os.environ, "QK_STUB_LOG": str(tmp_path / "log"), "LIBRARY_PATH": str(tmp_path)}
    environment |= {"LD_LIBRARY_PATH": str(tmp_path), "CPATH": f"{NVIDIA}/include"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len((tmp_path / "y").read_bytes()) == 64 * 2 and logged(tmp_path / "log")


INTERPRETED = """
import sys, torch, triton
from pathlib import Path
import triton.language as tl
from quantkit.export import aot
from quantkit.export.kernel_manifest import read_manifest
from quantkit.kernels import affine_dequantize, affine_gemm, affine_gemm_wide

KERNELS = {k: getattr(m, k) for m in (affine_dequantize, affine_gemm, affine_gemm_wide) for k in dir(m)
           if k.endswith("_kernel")}

class Interpreter:
    "Stands in for the driver: runs the kernel named in the manifest on the tensors that the plan names."
    def __init__(self, library): self.library = library
    def run(self, launches, scratch, rows, tensors):
        from quantkit.export.kernel_manifest import rule_at
        for i, rule in enumerate(scratch):
            tensors[f"scratch{i}"] = torch.full((rule_at(rule, rows) + 256,), 255, dtype=torch.uint8)
        for launch in launches:
            entry = self.library.manifest["kernels"][launch["kernel"]]
            values = {}
            for argument, (name, kind) in zip(launch["arguments"], entry["parameters"]):
                if argument == "null":
                    continue
                if isinstance(argument, str):
                    dtype = {"*fp16": torch.float16, "*fp32": torch.float32, "*u8": torch.uint8}[kind]
                    values[name] = tensors[argument].view(-1).view(dtype)
                else:
                    values[name] = argument["float"] if isinstance(argument, dict) and "float" in argument \\
                        else rule_at(argument, rows)
            types = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}
            constants = {k: types[v] if k == "DOT" else v for k, v in entry["constants"].items()}
            constants = {k: False if k == "ASM" else v for k, v in constants.items()}
            KERNELS[entry["kernel"]][tuple(rule_at(g, rows) for g in launch["grid"])](**values, **constants)

folder = Path(sys.argv[1])
library = aot.KernelLibrary(folder, read_manifest(folder), "gfx942", None)
library._run = Interpreter(library).run
given = torch.load(sys.argv[2])
torch.save([library.linear(sys.argv[3], x) for x in given], sys.argv[4])
"""


def test_the_plans_compute_the_product(exported: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Followed by Triton's interpreter: few rows, split K, and the dense route beyond the last plan."""
    layer = quantkit.load(checkpoint).get_submodule(LAYER)
    given = [torch.randn(rows, 64).half() for rows in (1, 3, 40, 130)]
    torch.save(given, tmp_path / "x.pt")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERPRETED, str(exported), str(tmp_path / "x.pt"), LAYER]
    done = subprocess.run([*command, str(tmp_path / "y.pt")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    dense = quantkit.encoding.dequantize(layer.packed, torch.float64)
    for x, got in zip(given, torch.load(tmp_path / "y.pt")):
        want = x.double() @ dense.T
        assert float((got.double() - want).norm() / want.norm()) < 1e-3


def test_register_answers_the_ops(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, the library is asked first; a product that was not exported goes on to the reference."""
    from quantkit.kernels import dispatch

    library = aot.KernelLibrary(exported, read_manifest(exported), "sm_80", None)  # type: ignore[arg-type]
    asked: list[Any] = []
    monkeypatch.setattr(library, "_product", lambda index, x, tensors: asked.append((index, sorted(tensors))))
    library.register()
    try:
        layer = library.layer(LAYER, "cpu")
        tensors = [layer.tensors[n] for n in ("codes", "scale", "zero")]
        installed = dispatch.implementation("affine_linear", "cuda")
        assert installed is not None
        x = torch.ones(2, 64, dtype=torch.float16)
        installed(x, *tensors, None, None, 4, 32, None)
        assert asked == [(0, ["codes", "scale", "zero"])]
        assert installed(x.float(), *tensors, None, None, 4, 32, None) is NotImplemented
    finally:
        for op in aot.OPS:
            dispatch.install(op, "cuda", None)
    assert dispatch.implementation("affine_linear", "cuda") is not installed


def test_rules_are_found_or_refused() -> None:
    rows = [1, 2, 3, 17, 40]
    assert launch_plan.fit(rows, [5] * 5).to_json() == 5
    assert launch_plan.fit(rows, [7 * m for m in rows]).at(1000) == 7000
    assert launch_plan.fit(rows, [3 * -(-m // 16) for m in rows]).at(33) == 9
    assert launch_plan.fit(rows, [-(-m * 100 // 256) for m in rows], [100]).at(64) == 25
    with pytest.raises(QuantkitError, match="no rule"):
        launch_plan.fit(rows, [1, 4, 9, 289, 1600])


def test_bad_requests(
    checkpoint: Path,
    exported: Path,
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ["-o", str(tmp_path / "out")]

    def refused(code: int, message: str, *arguments: str, destination: list[str] = out) -> None:
        assert run(["export", *arguments, *destination]) == code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert re.search(message, " ".join(lines)), lines
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*quantkit*"))

    kernels = ["--to", "kernels"]
    refused(2, "needs a chip", str(checkpoint), *kernels)
    refused(2, "unknown target 'sm_12'", str(checkpoint), *kernels, "-t", "sm_12")
    refused(2, "sm_75 has no bfloat16", str(checkpoint), *kernels, "-t", "sm_75", "--dtype", "bfloat16")
    refused(2, "no quantized layers", str(tiny("llama")), *kernels, "-t", "sm_80")
    refused(2, "for --to kernels, not torch", str(checkpoint), "--to", "torch", "-t", "sm_80")
    refused(5, "exists", str(checkpoint), *kernels, "-t", "sm_80", destination=["-o", str(exported)])
    with pytest.raises(UsageError, match="no kernels for sm_90, only sm_80, gfx942"):
        aot.load(exported, target="sm_90")
    with pytest.raises(CheckpointError, match="no manifest of exported kernels"):
        aot.load(tmp_path)


def test_triton_absent(checkpoint: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['triton'] = None; from quantkit.cli.app import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "export", str(checkpoint), "--to", "kernels", "-t", "sm_80"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "x")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "compiles with Triton, which is not installed" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "x").exists()
