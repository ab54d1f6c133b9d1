"""The main job on every family: what is written loads, is complete, and says the same as the source."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from tests_support import FAMILIES, kl, logits

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.errors import NumericsError, QuantkitError, UsageError
from quantkit.load import find_quantized
from quantkit.report_types import ConvertResult, PlanReport

#: Options that keep tiny layers (64 and 96 inputs) legal, and the largest mean KL that passes: four bits
#: on random weights give about 1e-2; a layer wired wrongly gives more than 1.
FORMATS = {
    "nf4": ({}, 0.15),
    "hqq": ({"group_size": 32}, 0.15),
    "fp8": ({}, 0.02),
    "gptq": ({"group_size": 32}, 0.15),
    "awq": ({"group_size": 32}, 0.15),
    "ternary": ({}, 3.0),
}


def run(source, out, fmt, ids, **kwargs) -> ConvertResult:
    options = {**FORMATS[fmt][0], **kwargs.pop("options", {})}
    result = quantkit.convert(
        source,
        out,
        format=fmt,
        options=options,
        calibration=ids,
        samples=len(ids),
        seqlen=ids.shape[1],
        **kwargs,
    )
    assert isinstance(result, ConvertResult)
    return result


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_converts_loads_and_stays_close(tiny, tmp_path, ids, family, fmt):
    if family == "bert" and fmt in ("gptq", "awq", "ternary"):
        pytest.skip("encoders: calibration-free formats only")
    source = tiny(family)
    result = run(source, tmp_path / "out", fmt, ids)
    divergence = kl(logits(source, ids), logits(tmp_path / "out", ids))
    assert 0 < divergence < FORMATS[fmt][1], result.worst_layers(3)
    assert all(r.weight_error > 0 for r in result.quantized)
    check_complete(source, tmp_path / "out")


def check_complete(source, out) -> None:
    """Every source tensor is either there byte for byte, quantized, or (AWQ) a rescaled one of the same
    shape and dtype; every file is carried over."""
    with CheckpointReader(source) as a, CheckpointReader(out) as b:
        found = find_quantized(b)
        assert found is not None and found.layers
        dense = set(found.dense)
        for name in a.names():
            if name in dense:
                assert b.info(name).shape == a.info(name).shape
                assert b.info(name).dtype == a.info(name).dtype
                if found.layout.name != "awq":
                    assert torch.equal(a.read(name), b.read(name)), name
                dense.discard(name)
            elif name.endswith(".weight"):
                base = name.removesuffix(".weight")
                assert base in found.layers, name
            else:  # a fused 3-D expert tensor, written per expert
                assert any(layer.startswith(name.rpartition(".")[0]) for layer in found.layers), name
        assert not dense
        files = {f.name for f in a.other_files()}
    for name in files:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert {"config.json", "README.md", *files} <= {p.name for p in out.iterdir()}


@pytest.mark.parametrize("fmt", ["gptq", "hqq"])
def test_fused_expert_tensors_on_disk(tiny, tmp_path, ids, fmt):
    """A checkpoint that stores experts as 3-D parameters is split into one layer per expert."""
    source = tiny("qwen3_moe")
    fused = tmp_path / "fused"
    fused.mkdir()
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        base = f"model.layers.{layer}.mlp.experts"
        part = {
            leaf: [tensors.pop(f"{base}.{i}.{leaf}.weight") for i in range(4)]
            for leaf in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{base}.gate_up_proj"] = torch.stack(
            [torch.cat(p) for p in zip(part["gate_proj"], part["up_proj"])]
        )
        tensors[f"{base}.down_proj"] = torch.stack(part["down_proj"])
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    (fused / "config.json").write_bytes((source / "config.json").read_bytes())
    torch.testing.assert_close(logits(fused, ids), logits(source, ids), rtol=0, atol=0)
    # On an accelerator the experts' outputs are summed by atomics, in any order: compare on the CPU.
    run(source, tmp_path / "a", fmt, ids, device="cpu")
    run(fused, tmp_path / "b", fmt, ids, device="cpu")
    torch.testing.assert_close(logits(tmp_path / "b", ids), logits(tmp_path / "a", ids), rtol=0, atol=0)


def test_expert_without_tokens_is_converted_and_reported(tiny, tmp_path):
    source = tiny("mixtral", num_local_experts=8)
    one = torch.full((2, 8), 7)  # one token over and over: at most two experts of a layer are hit
    result = run(source, tmp_path / "out", "gptq", one)
    unseen = [r for r in result.quantized if ".experts." in r.name and r.notes]
    assert unseen
    assert any("token" in note for r in unseen for note in r.notes)
    assert torch.isfinite(logits(tmp_path / "out", one)).all()


def test_sharded_in_and_out_give_the_same_tensors(tiny, tmp_path, ids):
    whole, sharded = tiny("llama"), tiny("llama", max_shard_size="100KB", tie_word_embeddings=False)
    assert (sharded / "model.safetensors.index.json").exists()
    run(sharded, tmp_path / "one", "nf4", ids)
    run(sharded, tmp_path / "many", "nf4", ids, max_shard_size="50KB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    with CheckpointReader(tmp_path / "one") as a, CheckpointReader(tmp_path / "many") as b:
        assert a.names() == b.names()
        assert all(torch.equal(a.read(n), b.read(n)) for n in a.names())
    assert whole != sharded


def test_tied_embeddings_stay_tied(tiny, tmp_path, ids):
    run(tiny("qwen2"), tmp_path / "out", "gptq", ids)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert not any(k.startswith("lm_head") for k in file.keys())  # noqa: SIM118
    model = quantkit.load(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_skip_and_override(tiny, tmp_path, ids):
    result = run(
        tiny("llama"),
        tmp_path / "out",
        "gptq",
        ids,
        skip=["layers.0.mlp.*"],
        overrides=[("down_proj", {"bits": 8}), ("re:layers\\.1\\.self_attn\\.[qk]", {"group_size": 64})],
    )
    by_name = {r.name: r for r in result.layers}
    assert by_name["model.layers.0.mlp.up_proj"].action == "kept"
    assert by_name["model.layers.1.mlp.down_proj"].options["bits"] == 8
    assert by_name["model.layers.1.self_attn.q_proj"].options["group_size"] == 64
    assert by_name["model.layers.1.self_attn.v_proj"].options["group_size"] == 32
    assert kl(logits(tiny("llama"), ids), logits(tmp_path / "out", ids)) < 0.15


@pytest.mark.parametrize(
    "kwargs, text",
    [
        ({"format": "gtpq"}, "Did you mean 'gptq'"),
        ({"format": "gptq", "options": {"bits": 5}}, "bits"),
        ({"format": "gptq", "options": {"gruop_size": 64}}, "Did you mean 'group_size'"),
        ({"format": "gptq", "skip": ["donw_proj"]}, "Did you mean 'down_proj'"),
        ({"format": "awq", "overrides": [("down_proj", {"bits": 8})]}, "awq"),
        ({"format": "nf4", "device": "cuda:7"}, "not available"),
        ({"format": "nf4", "dtype": "float12"}, "not supported"),
        ({"format": "gptq", "calibration": torch.full((2, 8), 999)}, "vocabulary"),
        ({"format": "gptq", "calibration": "/nonexistent/text.txt"}, "does not exist"),
    ],
)
def test_bad_requests_are_refused_in_one_line(tiny, tmp_path, kwargs, text):
    with pytest.raises(QuantkitError) as caught:
        quantkit.convert(tiny("llama"), tmp_path / "out", **kwargs)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_quantized_source_is_refused(tiny, tmp_path, ids):
    run(tiny("llama"), tmp_path / "out", "nf4", ids)
    with pytest.raises(UsageError, match="already quantized"):
        run(tmp_path / "out", tmp_path / "again", "gptq", ids)


def test_nan_weight_is_refused_by_name(tiny, tmp_path, ids):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "nan"
    source.mkdir()
    tensors = load_file(tiny("llama") / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_bytes((tiny("llama") / "config.json").read_bytes())
    for fmt in ("nf4", "gptq"):
        with pytest.raises(QuantkitError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
            run(source, tmp_path / "out", fmt, ids)
        assert not (tmp_path / "out").exists()


def test_dry_run_tells_the_size_that_comes_out(tiny, tmp_path, ids):
    for fmt in FORMATS:
        args = {"format": fmt, "options": FORMATS[fmt][0], "calibration": ids, "samples": 6, "seqlen": 48}
        plan = quantkit.convert(tiny("llama"), tmp_path / fmt, dry_run=True, **args)
        assert isinstance(plan, PlanReport)
        assert not (tmp_path / fmt).exists()
        quantkit.convert(tiny("llama"), tmp_path / fmt, **args)
        with CheckpointReader(tmp_path / fmt) as reader:
            # A JSON blob (NF4's quant_state) may differ by a few bytes; everything else is exact.
            assert abs(plan.size_after - reader.total_bytes) <= 64 * len(plan.quantized)


def test_indivisible_group_is_stated_and_strict_refuses(tiny, tmp_path, ids):
    source = tiny("llama", intermediate_size=100)
    result = run(source, tmp_path / "out", "gptq", ids)
    down = [r for r in result.layers if r.name.endswith("down_proj")]
    assert all(r.notes for r in down)
    assert result.warnings
    with pytest.raises(UsageError, match="down_proj"):
        run(source, tmp_path / "strict", "gptq", ids, strict=True)


def test_config_that_denies_layers(tiny, tmp_path, ids):
    source = tmp_path / "short"
    source.mkdir()
    config = json.loads((tiny("llama") / "config.json").read_text())
    (source / "model.safetensors").write_bytes((tiny("llama") / "model.safetensors").read_bytes())
    for layers, text in ((1, "promises 1 layers"), (3, "missing")):
        (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        with pytest.raises(QuantkitError, match=text):
            run(source, tmp_path / "out", "nf4", ids)
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(QuantkitError, match="shape"):
        run(source, tmp_path / "out", "nf4", ids)


def test_calibration_on_bfloat16_autocast_is_close(tiny, tmp_path, ids):
    run(tiny("llama"), tmp_path / "wide", "gptq", ids)
    run(tiny("llama"), tmp_path / "half", "gptq", ids, dtype="bfloat16")
    reference = logits(tiny("llama"), ids)
    assert kl(reference, logits(tmp_path / "half", ids)) < 1.5 * kl(reference, logits(tmp_path / "wide", ids))


def test_non_finite_result_is_an_error_not_a_file(tiny, tmp_path, ids, monkeypatch):
    from quantkit.formats.hqq import HQQ

    def broken(self, weight, config, stats):
        return honest(self, weight * float("inf"), config, stats)

    honest = HQQ.quantize
    monkeypatch.setattr(HQQ, "quantize", broken)
    with pytest.raises(NumericsError):
        run(tiny("llama"), tmp_path / "out", "hqq", ids)
    assert not (tmp_path / "out").exists()
