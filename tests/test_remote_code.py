"""Models that bring their own code: refused unless asked for, then converted and loaded like any other."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import quantkit
from quantkit.errors import QuantkitError

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig

Path({marker!r}).touch()


class TwistedConfig(LlamaConfig):
    model_type = "twisted_llama"
"""

MODELING = """
from transformers import LlamaForCausalLM
from .configuration_twisted import TwistedConfig


class TwistedForCausalLM(LlamaForCausalLM):
    config_class = TwistedConfig

    def forward(self, *args, **kwargs):  # what no stock class computes
        out = super().forward(*args, **kwargs)
        out.logits = -out.logits
        return out
"""


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory):
    """Where transformers copies remote code to: one folder, which Python's import system remembers."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        yield


@pytest.fixture
def twisted(tiny, tmp_path, modules_cache) -> tuple[Path, Path]:
    """(checkpoint of a model that only its own code knows, file that this code creates when it runs)."""
    import shutil

    source, marker = tmp_path / "twisted", tmp_path / "code-ran"
    shutil.copytree(tiny("llama"), source)
    (source / "configuration_twisted.py").write_text(CONFIGURATION.format(marker=str(marker)))
    (source / "modeling_twisted.py").write_text(textwrap.dedent(MODELING))
    config = json.loads((source / "config.json").read_text())
    config |= {
        "model_type": "twisted_llama",
        "architectures": ["TwistedForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_twisted.TwistedConfig",
            "AutoModelForCausalLM": "modeling_twisted.TwistedForCausalLM",
        },
    }
    (source / "config.json").write_text(json.dumps(config))
    return source, marker


@pytest.mark.parametrize("fmt", ["nf4", "gptq"])
def test_without_the_flag_no_code_runs_and_nothing_is_written(twisted, tmp_path, ids, fmt):
    source, marker = twisted
    with pytest.raises(QuantkitError, match="code") as caught:
        quantkit.convert(source, tmp_path / "out", format=fmt, calibration=ids, samples=6, seqlen=48)
    assert "trust" in f"{caught.value} {caught.value.hint}"
    with pytest.raises(QuantkitError):
        quantkit.load(source)
    assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("fmt, options", [("nf4", {}), ("gptq", {"group_size": 32})])
def test_with_the_flag_the_model_converts_and_computes_what_its_code_says(
    twisted, tiny, tmp_path, ids, fmt, options
):
    source, marker = twisted
    quantkit.convert(
        source,
        tmp_path / "out",
        format=fmt,
        options=options,
        calibration=ids,
        samples=6,
        seqlen=48,
        trust_remote_code=True,
    )
    assert marker.exists()
    for name in ("configuration_twisted.py", "modeling_twisted.py"):  # carried over byte for byte
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    with pytest.raises(QuantkitError):
        quantkit.load(tmp_path / "out")
    model = quantkit.load(tmp_path / "out", dtype=torch.float32, trust_remote_code=True)
    plain = quantkit.load(tiny("llama"), dtype=torch.float32)
    with torch.no_grad():
        ours, stock = model(input_ids=ids).logits, plain(input_ids=ids).logits
    # The sign is the code's. What is left is 4-bit error (0.4 was seen); without the sign it would be 2.
    assert (ours + stock).norm() < 0.8 * stock.norm()


def test_the_command_line_flag(twisted, tmp_path, monkeypatch):
    source, marker = twisted
    command = [sys.executable, "-m", "quantkit", "convert", str(source), "--format", "nf4"]
    command += ["-o", str(tmp_path / "out")]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and "--trust-remote-code" in refused.stderr
    assert not marker.exists()
    done = subprocess.run([*command, "--trust-remote-code"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert marker.exists() and (tmp_path / "out" / "modeling_twisted.py").exists()
