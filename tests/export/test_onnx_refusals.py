"""ONNX export refuses in one line and leaves nothing: wrong artifacts, wrong requests, full disks."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.cli.app import run
from quantkit.errors import DestinationError, NumericsError, UsageError
from quantkit.export import api
from quantkit.export.api import export

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture
def checkpoint(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    quantkit.convert(tiny("llama"), tmp_path / "ckpt", format="hqq", options={"bits": 4, "group_size": 32})
    return tmp_path / "ckpt"


def assert_nothing_left(tmp_path: Path, *kept: str) -> None:
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == sorted(kept)


@pytest.mark.parametrize("layer", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_damaged_file_is_not_published(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    """The scales of one key projection are damaged in the written file; the proof names that layer."""
    import onnx

    from quantkit.export import onnx_graph

    def damage(decoder: Any, shape: Any, opset: int, folder: Path, **options: Any) -> Any:
        nodes = original(decoder, shape, opset, folder, **options)
        model = onnx.load(folder / onnx_graph.MODEL, load_external_data=False)
        (tensor,) = [t for t in model.graph.initializer if f"layers.{layer}.self_attn.k_proj.scale" in t.name]
        assert tensor.raw_data  # too small for the data file
        scale = torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.float32)
        assert tensor.data_type == onnx.TensorProto.FLOAT
        tensor.raw_data = (scale * 1.5).view(torch.uint8).numpy().tobytes()
        onnx.save(model, folder / onnx_graph.MODEL)
        return nodes

    original = onnx_graph.to_onnx
    monkeypatch.setattr(onnx_graph, "to_onnx", damage)
    with pytest.raises(NumericsError, match=f"first seen in the keys of layer {layer} "):
        export(checkpoint, tmp_path / "onnx")
    assert_nothing_left(tmp_path, "ckpt")


def test_atol_is_the_limit(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["export", str(checkpoint), "-o", str(tmp_path / "onnx"), "--atol", "1e-12"])
    err = capsys.readouterr().err
    assert code == NumericsError.exit_code and "allowed 1e-12" in err and "Traceback" not in err
    assert_nothing_left(tmp_path, "ckpt")


def test_dense_checkpoints_are_exported_with_a_notice(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(["export", str(tiny("qwen2")), "-o", str(tmp_path / "onnx")])
    out, err = capsys.readouterr()
    assert code == 0 and "is not quantized: exported as it is" in " ".join((out + err).split())
    assert (tmp_path / "onnx/model.onnx").is_file()
    # The summary table:
    for row in ("artifact", "nodes", "largest error", "relative error", "decode", "quantkit"):
        assert row in out


def test_architectures_are_named_before_weights_are_read(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(api, "load", never)
    for family, name in (("gpt2", "GPT2LMHeadModel"), ("bert", "BertForMaskedLM")):
        with pytest.raises(UsageError, match=name):
            export(tiny(family), tmp_path / "out")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--opset", "17"], "opset 17 is too old"),
        (["--opset", "99"], "opset 99 is too new"),
        (["--to", "onxx"], "onnx"),
        (["--accuracy-level", "3"], "accuracy level 3"),
        (["--device", "gpu"], "gpu"),
        (["--atol", "-1"], "atol"),
        (["--keep-ops"], "--keep-ops"),
        (["--standard", "--to", "torch"], "--standard"),
        (["--opset", "23", "--accuracy-level", "4", "--to", "torch"], "--accuracy-level"),
    ],
)
def test_wrong_options(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    code = run(["export", str(checkpoint), "-o", str(tmp_path / "out"), *options])
    err = capsys.readouterr().err
    assert code != 0 and message in err and "Traceback" not in err
    assert_nothing_left(tmp_path, "ckpt")


@pytest.mark.parametrize("target", ["onnx", "torch", pytest.param("aoti", marks=pytest.mark.slow)])
def test_a_full_disk(checkpoint: Path, tmp_path: Path, target: str) -> None:
    """No file may grow beyond a size: the weights do not fit. (What a compiler writes elsewhere may be large.)"""
    size = 24_000 if target != "aoti" else (checkpoint / "model.safetensors").stat().st_size

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    command = [sys.executable, "-m", "quantkit", "export", str(checkpoint), "-o", str(tmp_path / "out")]
    command += ["--to", target]
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=limit, timeout=300, env=environment
    )
    assert done.returncode == DestinationError.exit_code, done.stderr[-1000:]
    doing = "compiling" if target == "aoti" else "writing"
    assert f"The disk is full while {doing}" in done.stderr and "Traceback" not in done.stderr
    assert_nothing_left(tmp_path, "ckpt")


def test_no_space_before_work_starts(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code = run(["export", str(checkpoint), "-o", str(tmp_path / "out")])
    assert code != 0 and "The disk is full" in capsys.readouterr().err
    assert_nothing_left(tmp_path, "ckpt")
