"""torch.export: the file runs where quantkit and triton cannot be imported, and computes the same tokens."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_support import FORMATS, convert, fresh_error

import quantkit
from quantkit.cli.app import run
from quantkit.encoding import Codebook, Float8, PackedWeight, pack_affine
from quantkit.errors import UsageError
from quantkit.export import aten_layers, program
from quantkit.export.api import export
from quantkit.generate import _tokens
from quantkit.kernels import reference
from quantkit.kernels.dispatch import use_reference
from quantkit.linear import QuantLinear

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BLOCKED = """
import runpy, sys
for name in ("quantkit", "triton", "transformers", "onnx"):
    sys.modules[name] = None  # importing it raises
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_blocked(script: Path, *arguments: str) -> list[int]:
    """Run a script in a process whose imports of quantkit and triton fail; its list of tokens."""
    command = [sys.executable, "-c", BLOCKED, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(token) for token in done.stdout.split(",")]


def greedy(checkpoint: Path, prompt: list[int], count: int) -> list[int]:
    """What `quantkit generate` would make, end tokens included."""
    model = quantkit.load(checkpoint, dtype="float32")
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    with use_reference():
        return list(_tokens(model, torch.tensor([prompt]), count, 0.0, 0))


@pytest.mark.slow  # the documented commands, below, run the same script without quantkit and triton
def test_runs_without_quantkit_and_triton(tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "hqq"
    quantkit.convert(tiny("llama"), checkpoint, format="hqq", options={"bits": 4, "group_size": 32})
    result = export(checkpoint, tmp_path / "out", to="torch")
    assert result.proof.relative_error < 1e-5 and not any("quantkit" in kind for kind in result.nodes)
    prompt = torch.randint(3, 256, (7,)).tolist()
    made = run_blocked(
        EXAMPLES / "run-pt2/generate.py", str(tmp_path / "out"), ",".join(map(str, prompt)), "12"
    )
    assert made == greedy(checkpoint, prompt, 12)


def test_fresh_sizes(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Other batches, prompts and cache lengths than the proof's: prompt, three tokens at once, one."""
    checkpoint = convert(tiny("qwen2"), tmp_path / "gptq", "gptq")
    export(checkpoint, tmp_path / "out", to="torch")
    run = torch.export.load(tmp_path / "out/model.pt2").module()
    model = quantkit.load(checkpoint, dtype="float32")
    for batch, prompt, length in ((1, 1, 16), (1, 17, 64), (3, 5, 9)):
        runner = program.StaticRunner(run, program.cache_shape(model), length=length)
        assert fresh_error(model, runner, batch, (prompt, 3, 1)) < 1e-5


def test_a_full_disk_is_an_error_while_torch_writes() -> None:
    """torch's own writer would end the process. Archives go through a file that remembers the error."""
    made = torch.export.export(torch.nn.Linear(400, 400), (torch.zeros(2, 400),))
    with pytest.raises(OSError, match="No space left"):
        program.save(made, Path("/dev/full"))


def test_a_compiler_that_fails(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("C++ compile error\nwith many lines")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    monkeypatch.setattr(program, "check_compiler", lambda: None)
    with pytest.raises(
        UsageError, match=r"AOTInductor cannot compile the program: RuntimeError: C\+\+ compile error\."
    ):
        export(tiny("llama"), tmp_path / "out", to="aoti")
    assert not list(tmp_path.iterdir())


def test_keep_ops(tiny: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "hqq"
    quantkit.convert(tiny("llama"), checkpoint, format="hqq", options={"bits": 4, "group_size": 32})
    result = export(checkpoint, tmp_path / "out", to="torch", keep_ops=True)
    assert result.nodes["quantkit.affine_linear.default"] == 14
    assert result.proof.relative_error < 1e-5


def random_weight(kind: str, n: int, k: int) -> PackedWeight:
    """Random packed weights of odd shapes."""
    if kind == "codebook":
        blocks = -(-n * k // 64)
        codes = torch.randint(0, 256, (-(-n * k // 2),), dtype=torch.uint8)
        return PackedWeight(
            Codebook(4, 64), (n, k), codes, torch.rand(blocks), lut=torch.randn(16).sort().values
        )
    if kind.startswith("float8"):
        block = {"float8": (128, 128), "float8-channel": (1, k)}[kind]
        codes = (torch.randn(n, k) * 3).to(torch.float8_e4m3fn).view(torch.uint8)
        scale = torch.rand(-(-n // block[0]), -(-k // block[1]))
        return PackedWeight(Float8(block), (n, k), codes, scale, activation="fp8_token")
    bits, group, zeros = kind.split("-")
    groups = -(-k // int(group))
    zero = torch.randint(0, 2 ** int(bits), (n, groups), dtype=torch.uint8)
    zero = {"int": zero, "same": torch.full_like(zero, 2), "float": zero + torch.rand(n, groups)}[zeros]
    codes = torch.randint(0, 2 ** int(bits), (n, k), dtype=torch.uint8)
    scale = (torch.rand(n, groups) * 0.1).half()
    return pack_affine(codes, scale, zero, int(bits), int(group), perm=torch.randperm(k))


@pytest.mark.parametrize(
    "kind",
    ["4-32-int", "2-16-int", "3-32-int", "8-32-int", "1-32-float", "4-96-same", "8-48-float", "codebook", "float8",
     "float8-channel"],
)  # fmt: skip
@pytest.mark.parametrize(("n", "k"), [(48, 96), (63, 100)])
def test_layers_of_aten_operations_equal_the_reference(kind: str, n: int, k: int) -> None:
    packed = random_weight(kind, n, k)
    bias = torch.randn(n)
    x = torch.randn(3, 5, k)
    with torch.no_grad():
        got = aten_layers.aten_layer(QuantLinear(packed, bias))(x)
    want = reference.quant_linear(x.double(), packed, bias.double())
    assert float((got - want).norm() / want.norm()) < 2e-6


def test_ternary_layer_keeps_the_integer_product() -> None:
    codes, one = torch.randint(0, 3, (40, 100), dtype=torch.uint8), torch.ones(40, 1, dtype=torch.uint8)
    packed = pack_affine(codes, torch.rand(40, 1), one, 2, 100, activation="int8_token")
    x = torch.randn(2, 3, 100)
    with torch.no_grad():
        got = aten_layers.aten_layer(QuantLinear(packed))(x)
    assert torch.equal(got, reference.quant_linear(x, packed, None))


def documented(heading: str) -> list[list[str]]:
    """The commands in the shell blocks of a section of docs/export.md, as lists of words."""
    page = (EXAMPLES.parent / "docs/export.md").read_text(encoding="utf-8")
    section = page[page.index(f"## {heading}") :].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_the_documented_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/export.md, section torch.export, word for word on the example."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    quantkit.convert("examples/pydoc-qwen2-3m", "CHECKPOINT", format="nf4")
    first, second = documented("torch.export")
    assert first[0] == "quantkit" and run(first[1:]) == 0
    assert second[:2] == ["python", "examples/run-pt2/generate.py"]
    made = run_blocked(Path(second[1]), *second[2:])
    assert made == greedy(Path("CHECKPOINT"), [int(t) for t in second[3].split(",")], int(second[4]))


@pytest.mark.slow
def test_the_documented_commands_of_aoti_run(tmp_path: Path) -> None:
    """Section AOTInductor, word for word on the example: compiled, then run without Python."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    shutil.copytree(EXAMPLES / "run-aoti-cpp", tmp_path / "examples/run-aoti-cpp")
    quantkit.convert(EXAMPLES / "pydoc-qwen2-3m", tmp_path / "CHECKPOINT", format="hqq")
    commands = documented("AOTInductor")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", "\n".join(map(shlex.join, commands))],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    count, *prompt = map(int, commands[-1][5:])
    made = [int(t) for t in done.stdout.splitlines()[-1].split(",")]
    assert made == greedy(tmp_path / "CHECKPOINT", prompt, count)


@pytest.mark.slow
def test_the_example_is_as_small_as_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "q"
    quantkit.convert(
        EXAMPLES / "pydoc-qwen2-3m", checkpoint, format="hqq", options={"bits": 4, "group_size": 64}
    )
    result = export(checkpoint, tmp_path / "out", to="torch")
    assert result.artifact_bytes < 1.03 * result.checkpoint_bytes
    prompt = [1, 484, 769, 347]
    text = ",".join(map(str, prompt))
    made = run_blocked(EXAMPLES / "run-pt2/generate.py", str(tmp_path / "out"), text, "8")
    assert made == greedy(checkpoint, prompt, 8)


def test_bad_requests(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny("llama")
    with pytest.raises(UsageError, match="is for --to aoti, not torch"):
        export(source, tmp_path / "out", to="torch", device="cuda")
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        export(source, tmp_path / "out", to="aoti", device="gpu")
    if not torch.accelerator.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            export(source, tmp_path / "out", to="aoti", device="cuda")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler"):
        export(source, tmp_path / "out", to="aoti")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_aoti_package_and_its_runner_without_python(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Qwen2 (biases, tied) in GPTQ with act-order: the proof passes, and C++ makes the tokens of `generate`."""
    checkpoint = tmp_path / "gptq"
    source = tiny("qwen2", dtype=torch.bfloat16)
    quantkit.convert(source, checkpoint, format="gptq", options=FORMATS["gptq"], samples=2, seqlen=32)
    result = export(checkpoint, tmp_path / "out", to="aoti")
    assert result.proof is not None and result.proof.relative_error < 1e-5
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "generate"
    command = ["sh", str(EXAMPLES / "run-aoti-cpp/build.sh"), sys.executable]
    subprocess.run(command, env={**os.environ, "OUT": str(program)}, check=True)
    config = json.loads((tmp_path / "out/config.json").read_text())
    size = config["hidden_size"] // config["num_attention_heads"]
    shape = [config["num_hidden_layers"], config["num_key_value_heads"], size]
    prompt = torch.randint(3, 256, (7,)).tolist()
    arguments = [str(tmp_path / "out/model.pt2"), *map(str, [*shape, 12, *prompt])]
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    assert [int(t) for t in done.stdout.split(",")] == greedy(checkpoint, prompt, 12)


@pytest.mark.slow
def test_a_fresh_environment_with_only_torch(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """No blocker: quantkit, triton and transformers are not installed there."""
    checkpoint = tmp_path / "hqq"
    quantkit.convert(tiny("llama"), checkpoint, format="hqq", options={"bits": 4, "group_size": 32})
    export(checkpoint, tmp_path / "out", to="torch")
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    wanted = f"torch=={torch.__version__.split('+')[0]}"
    installed = subprocess.run([python, "-m", "pip", "install", "-q", wanted], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"torch cannot be installed: {installed.stderr[-200:]}")
    prompt = torch.randint(3, 256, (7,)).tolist()
    script = EXAMPLES / "run-pt2/generate.py"
    command = [python, str(script), str(tmp_path / "out"), ",".join(map(str, prompt)), "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [int(t) for t in done.stdout.split(",")] == greedy(checkpoint, prompt, 12)
