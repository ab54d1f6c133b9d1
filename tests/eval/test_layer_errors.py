"""Output errors per layer against a float64 recomputation, and advice that `convert` accepts as printed."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quantkit
from quantkit.cli.app import run
from quantkit.encoding import dequantize
from quantkit.errors import UsageError
from quantkit.eval.layer_errors import SourceWeights, advise, layer_errors
from quantkit.eval.results import LayerError
from quantkit.linear import QuantLinear
from quantkit.load import load
from quantkit.options import parse_override
from quantkit.plan import matches

IDS = torch.randint(3, 256, (200,), generator=torch.Generator().manual_seed(2))
FORMATS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 3, "group_size": 32},
    "hqq": {"bits": 2, "group_size": 64},
    "awq": {"group_size": 32},
    "nf4": {},
    "fp8": {},
    "ternary": {},
}


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    cache: dict[tuple[str, str], Path] = {}

    def make(family: str, fmt: str) -> Path:
        if (family, fmt) not in cache:
            out = tmp_path_factory.mktemp("layers") / fmt
            quantkit.convert(tiny(family), out, format=fmt, options=FORMATS[fmt], samples=4, seqlen=32)
            cache[family, fmt] = out
        return cache[family, fmt]

    return make


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases
def test_against_float64(tiny: Callable[..., Path], made: Callable[[str, str], Path], family: str) -> None:
    model = load(made(family, "hqq"), dtype=torch.float32)
    source = load_file(tiny(family) / "model.safetensors")
    with SourceWeights(str(tiny(family))) as weights:
        found = layer_errors(model, weights, IDS, layout="hqq")
    assert len(found) == 14 and [layer.layer for layer in found] == [0] * 7 + [1] * 7
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0])
            )
    with torch.no_grad():
        model(input_ids=IDS[None])
    for layer in found:
        x = inputs[layer.name][0].double()
        want = x @ source[f"{layer.name}.weight"].double().T
        got = x @ dequantize(model.get_submodule(layer.name).packed, torch.float64).T
        assert layer.tokens == len(IDS)
        assert layer.relative == pytest.approx(float((want - got).norm() / want.norm()), rel=1e-4)
        cosine = torch.nn.functional.cosine_similarity(want, got, dim=1).mean()
        assert layer.cosine == pytest.approx(float(cosine), rel=1e-5)
    assert {layer.kind for layer in found} >= {"mlp.down_proj", "self_attn.q_proj"}


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_has_plausible_errors(
    tiny: Callable[..., Path], made: Callable[[str, str], Path], fmt: str
) -> None:
    model = load(made("llama", fmt), dtype=torch.float32)
    with SourceWeights(str(tiny("llama"))) as weights:
        found = layer_errors(model, weights, IDS, layout=fmt)
    limit = {"fp8": 0.06, "nf4": 0.2, "awq": 0.2, "gptq": 0.5, "hqq": 0.8, "ternary": 1.0}[fmt]
    assert found and all(0.001 < layer.relative < limit for layer in found)
    assert all(layer.cosine > 0.3 for layer in found)


def test_experts_that_no_token_reaches_are_left_out(tiny: Callable[..., Path], tmp_path: Path) -> None:
    quantkit.convert(tiny("mixtral"), tmp_path / "q", format="nf4")
    model = load(tmp_path / "q", dtype=torch.float32)
    with SourceWeights(str(tiny("mixtral"))) as weights:
        found = layer_errors(model, weights, IDS[:1], layout="nf4")
        whole = layer_errors(model, weights, IDS, layout="nf4")
    experts = [layer for layer in found if ".experts." in layer.name]
    assert 0 < len(experts) < len([layer for layer in whole if ".experts." in layer.name])
    assert any("*" in layer.kind for layer in experts)


@pytest.mark.parametrize("fmt", FORMATS)
def test_advice_is_accepted_as_printed(
    tiny: Callable[..., Path], made: Callable[[str, str], Path], tmp_path: Path, fmt: str, capsys: Any
) -> None:
    """Round trip: every printed flag goes through the command line and changes just those layers."""
    source, made_at = tiny("llama"), made("llama", fmt)
    model = load(made_at, dtype=torch.float32)
    with SourceWeights(str(source)) as weights:
        found = layer_errors(model, weights, IDS, layout=fmt)
    advise(found, str(made_at))
    advised = [layer for layer in found if layer.advice]
    assert len(advised) == 5
    assert {layer.name for layer in advised} == {
        layer.name for layer in sorted(found, key=lambda one: -one.relative)[:5]
    }
    settings = [word for key, value in FORMATS[fmt].items() for word in ("--set", f"{key}={value}")]
    texts = sorted({text for layer in advised for text in layer.advice})
    assert any(text.startswith("--skip") for text in texts)
    if fmt in ("gptq", "hqq"):
        assert any("bits=" in text for text in texts) and any("group_size=" in text for text in texts)
    for text in texts:
        code = run(
            ["convert", str(source), "--format", fmt, "--dry-run", "--json", *settings, *shlex.split(text)]
        )
        out, err = capsys.readouterr()
        assert code == 0, f"{text}: {err}"
        pattern = shlex.split(text)[1]
        if text.startswith("--override"):
            pattern, changes = parse_override(pattern)
            assert all(f'"{key}": {value}' in out for key, value in changes.items())
        hit = [layer for layer in advised if text in layer.advice]
        assert hit and all(matches(pattern, layer.name) for layer in hit)


def measured(source: Path, made_at: Path, fmt: str) -> dict[str, LayerError]:
    with SourceWeights(str(source)) as weights:
        found = layer_errors(load(made_at, dtype=torch.float32), weights, IDS, layout=fmt)
    advise(found, str(made_at))
    return {layer.name: layer for layer in found}


@pytest.mark.parametrize("fmt", FORMATS)
def test_advice_helps(
    tiny: Callable[..., Path], made: Callable[[str, str], Path], tmp_path: Path, fmt: str, capsys: Any
) -> None:
    """Every printed flag, given to `convert` as printed, lowers the error of the layers it is for. The first advice of
    all layers goes into one conversion, then the second, then the third."""
    source = tiny("llama")
    before = measured(source, made("llama", fmt), fmt)
    advised = {name: layer.advice for name, layer in before.items() if layer.advice}
    settings = [word for key, value in FORMATS[fmt].items() for word in ("--set", f"{key}={value}")]
    tried = 0
    for rank in range(max(map(len, advised.values()))):
        texts = {name: advice[rank] for name, advice in advised.items() if rank < len(advice)}
        flags = [word for text in sorted(set(texts.values())) for word in shlex.split(text)]
        out = tmp_path / str(rank)
        asked = ["--samples", "4", "--seqlen", "32", *settings, *flags]
        code = run(["convert", str(source), "--format", fmt, "-o", str(out), *asked])
        assert code == 0, capsys.readouterr().err
        after = measured(source, out, fmt)
        for name, text in texts.items():
            tried += 1
            if text.startswith("--skip"):
                assert name not in after, text
            else:
                assert after[name].relative < 0.9 * before[name].relative, text
    assert tried == 5 * {"gptq": 3, "hqq": 3, "nf4": 2}.get(fmt, 1)  # the others mix nothing: --skip


def test_advice_starts_from_a_layers_own_width(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """hqq's config.json has one width and group size per kind of layer; the tensors know better."""
    quantkit.convert(
        tiny("llama"),
        tmp_path / "mixed",
        format="hqq",
        options={"bits": 3, "group_size": 64},
        overrides=[
            ("model.layers.0.mlp.down_proj", {"bits": 1, "group_size": 32}),
            ("model.layers.1.mlp.down_proj", {"bits": 4, "group_size": 96}),
        ],
    )
    found = measured(tiny("llama"), tmp_path / "mixed", "hqq")
    advise(list(found.values()), str(tmp_path / "mixed"), count=len(found))
    low, high = (found[f"model.layers.{n}.mlp.down_proj"] for n in (0, 1))
    assert (low.bits, low.group_size) == (1, 32) and (high.bits, high.group_size) == (4, 96)
    assert low.advice[:2] == [f"--override {low.name}:{change}" for change in ("bits=2", "group_size=16")]
    assert high.advice[:2] == [f"--override {high.name}:{change}" for change in ("bits=8", "group_size=32")]
    other = found["model.layers.0.self_attn.o_proj"]
    assert other.bits == 3 and other.advice[0].endswith(":bits=4")


def test_advice_keeps_fused_layers_alike(tiny: Callable[..., Path], made: Callable[[str, str], Path]) -> None:
    with SourceWeights(str(tiny("llama"))) as weights:
        found = layer_errors(load(made("llama", "gptq"), dtype=torch.float32), weights, IDS)
    advise(found, str(made("llama", "gptq")), count=len(found))
    up = next(layer for layer in found if layer.name == "model.layers.1.mlp.up_proj")
    pattern, changes = parse_override(shlex.split(up.advice[0])[1])
    assert changes == {"bits": 4}
    hit = [layer.name for layer in found if matches(pattern, layer.name)]
    assert hit == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
    query = next(layer for layer in found if layer.name == "model.layers.0.self_attn.q_proj")
    assert "self_attn.[qkv]_proj:bits=4" in query.advice[0]


def test_a_quantized_source_has_no_weights_to_compare_with(made: Callable[[str, str], Path]) -> None:
    with pytest.raises(UsageError, match="itself quantized"):
        SourceWeights(str(made("llama", "nf4")))
