"""GPTQ files: goldens that gptqmodel wrote, round trips, both revisions, hostile tensors, config.json."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit.encoding import Affine, PackedWeight, affine_codes, dequantize, pack_affine
from quantkit.errors import CheckpointError, ConfigError, NumericsError
from quantkit.formats import get_format, get_layout
from quantkit.formats.base import LayerStats, Needs, QuantizedLayers, merge_config, take_notes
from quantkit.formats.gptq import GPTQ, GPTQConfig

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT.parent / "shared" / "golden"
IDS = [5, 17, 300, 42, 99, 256, 400, 7]  # the input of the goldens' logits
GPTQ_FORMAT = GPTQ()

golden = pytest.mark.parametrize("name", ["gptq_llama_b3", "gptq_llama_g128", "gptq_qwen2_asym_act_g64"])
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden is absent")


def random_weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def random_stats(k: int, tokens: int = 300, seed: int = 1) -> LayerStats:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=g) * (0.1 + torch.rand(k, generator=g))
    return LayerStats(tokens, x.T @ x, x.abs().sum(0))


def numpy_dequantize(t: dict[str, torch.Tensor], bits: int, version: int) -> np.ndarray:
    """`[N, K]` float32, read bit by bit through Python integers: nothing in common with quantkit."""

    def fields(words: np.ndarray, count: int) -> list[int]:
        stream = int.from_bytes(words.astype("<i4").tobytes(), "little")
        return [(stream >> (bits * i)) & (2**bits - 1) for i in range(count)]

    qweight, qzeros = t["qweight"].numpy(), t["qzeros"].numpy()
    scales, g_idx = t["scales"].float().numpy(), t["g_idx"].numpy()
    n, k = qweight.shape[1], g_idx.shape[0]
    codes = np.array([fields(np.ascontiguousarray(qweight[:, column]), k) for column in range(n)])
    zeros = np.array([fields(row, n) for row in qzeros]) + (1 if version == 1 else 0)
    return ((codes - zeros[g_idx].T) * scales[g_idx].T).astype(np.float32)


def golden_layers(name: str) -> tuple[dict[str, PackedWeight], dict[str, torch.Tensor], GPTQConfig]:
    folder = GOLDEN / name
    mapping = json.loads((folder / "config.json").read_text())["quantization_config"]
    read = GPTQ_FORMAT.from_hf_config(mapping)
    tensors = load_file(folder / "model.safetensors")
    layers = {}
    for key in tensors:
        if key.endswith(".qweight"):
            module = key.removesuffix(".qweight")
            parts = {s: tensors[f"{module}.{s}"] for s in GPTQ_FORMAT.suffixes}
            shape = (parts["scales"].shape[1], parts["g_idx"].shape[0])
            layers[module] = GPTQ_FORMAT.from_checkpoint(parts, read.config_for(module), shape)
    return layers, tensors, read.config


@needs_golden
@golden
def test_golden_weights_against_numpy(name: str) -> None:
    layers, tensors, config = golden_layers(name)
    assert len(layers) == 28
    for module, packed in list(layers.items())[:8]:
        parts = {s: tensors[f"{module}.{s}"] for s in GPTQ_FORMAT.suffixes}
        expected = numpy_dequantize(parts, config.bits, config.version)
        np.testing.assert_array_equal(dequantize(packed).numpy(), expected, err_msg=module)


@needs_golden
@golden
def test_golden_files_come_back_bit_for_bit(name: str) -> None:
    layers, tensors, config = golden_layers(name)
    for module, packed in layers.items():
        assert (packed.perm is not None) == config.desc_act
        written = GPTQ_FORMAT.to_checkpoint(packed, config)
        spec = GPTQ_FORMAT.checkpoint_spec(packed.shape, config)
        for suffix, tensor in written.items():
            assert torch.equal(tensor, tensors[f"{module}.{suffix}"]), f"{module}.{suffix}"
            assert (tensor.dtype, tuple(tensor.shape)) == (spec[suffix].dtype, spec[suffix].shape)


@needs_golden
@golden
def test_golden_logits(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    layers, tensors, _ = golden_layers(name)
    config = AutoConfig.from_pretrained(GOLDEN / name)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {k: v.float() for k, v in tensors.items() if k.rpartition(".")[2] not in GPTQ_FORMAT.suffixes}
    state |= {f"{module}.weight": dequantize(packed) for module, packed in layers.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(m == "lm_head.weight" for m in missing)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits.numpy()
    for file in ("np_logits.npy", "ag_logits.npy"):
        if (GOLDEN / name / file).exists():
            want = np.load(GOLDEN / name / file)
            relative = np.linalg.norm(logits - want) / np.linalg.norm(want)
            assert relative < (1e-5 if file.startswith("np") else 2e-3), (file, relative)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_round_trip(bits: int, sym: bool, desc_act: bool, group_size: int) -> None:
    weight, stats = random_weight(64, 96), random_stats(96)
    config = GPTQConfig(bits=bits, sym=sym, desc_act=desc_act, group_size=group_size, sweeps=1)
    packed = GPTQ_FORMAT.quantize(weight, config, stats)
    assert GPTQ_FORMAT.needs(config) is Needs.HESSIAN and not take_notes()
    tensors = GPTQ_FORMAT.to_checkpoint(packed, config)
    spec = GPTQ_FORMAT.checkpoint_spec((64, 96), config)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()} == {
        k: (v.dtype, v.shape) for k, v in spec.items()
    }
    np.testing.assert_array_equal(numpy_dequantize(tensors, bits, config.version), dequantize(packed).numpy())
    again = GPTQ_FORMAT.from_checkpoint(tensors, config, (64, 96))
    assert again.encoding == packed.encoding == Affine(bits, 96 if group_size == -1 else 32)
    one_group = group_size == -1
    for name, tensor in packed.tensors().items():
        if not (one_group and desc_act):  # then g_idx is trivial and the order is not kept
            assert torch.equal(getattr(again, name), tensor), name
    assert torch.equal(dequantize(again), dequantize(packed))
    if sym:
        assert packed.zero is not None and bool((packed.zero == 2 ** (bits - 1)).all())
    wrong = float((dequantize(packed) - weight).norm() / weight.norm())
    assert wrong < {2: 0.65, 3: 0.35, 4: 0.17, 8: 0.02}[bits]


def test_default_file_needs_no_g_idx_and_beats_rounding() -> None:
    weight, stats = random_weight(64, 256), random_stats(256)
    packed = GPTQ_FORMAT.quantize(weight, GPTQConfig(), stats)
    plain = GPTQ_FORMAT.quantize(weight, GPTQConfig(search="minmax"), LayerStats())
    assert packed.perm is None and "no calibration tokens" in take_notes()[0]
    assert stats.hessian is not None
    loss = {
        name: float(((dequantize(p) - weight) @ stats.hessian * (dequantize(p) - weight)).sum())
        for name, p in (("gptq", packed), ("rtn", plain))
    }
    assert loss["gptq"] < 0.75 * loss["rtn"]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 4),
    k=st.integers(1, 6),
    bits=st.sampled_from([2, 3, 4, 8]),
    version=st.sampled_from([1, 2]),
    shuffle=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_codes_survive(n: int, k: int, bits: int, version: int, shuffle: bool, seed: int) -> None:
    n, k, group = n * 32, k * 32, 32
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
    zero = torch.randint(2 - version, 2**bits, (n, k // group), generator=g, dtype=torch.uint8)
    scale = (torch.rand(n, k // group, generator=g) - 0.5).half()
    perm = None
    if shuffle:
        perm = torch.randperm(k, generator=g).view(-1, group).sort(1).values.flatten()
    packed = pack_affine(codes, scale, zero, bits, group, perm=perm)
    config = GPTQConfig(
        bits=bits, group_size=group, sym=False, checkpoint_format="gptq" if version == 1 else "gptq_v2"
    )
    tensors = GPTQ_FORMAT.to_checkpoint(packed, config)
    again = GPTQ_FORMAT.from_checkpoint(tensors, config, (n, k))
    assert torch.equal(dequantize(again), dequantize(packed))
    if again.perm is not None:
        assert torch.equal(affine_codes(again), codes)
    np.testing.assert_array_equal(numpy_dequantize(tensors, bits, version), dequantize(packed).numpy())


def test_v1_zeros() -> None:
    config = GPTQConfig(group_size=32, sym=False, checkpoint_format="gptq")
    # gptqmodel's writer subtracts 0x11111111 from the word; a zero of 0 borrows from its neighbour.
    zeros = torch.tensor([3, 0, 15, 8, 0, 0, 1, 9], dtype=torch.uint8)
    word = sum(int(z) << (4 * i) for i, z in enumerate(zeros)) - 0x11111111
    tensors = {
        "qweight": torch.zeros(4, 8, dtype=torch.int32),
        "qzeros": torch.tensor([[word - (1 << 32) if word >= 1 << 31 else word]]).to(torch.int32),
        "scales": torch.ones(1, 8).half(),
    }
    packed = GPTQ_FORMAT.from_checkpoint(tensors, config, (8, 32))
    assert packed.zero is not None and torch.equal(packed.zero.flatten(), zeros)
    with pytest.raises(NumericsError, match="zero of 0"):
        GPTQ_FORMAT.to_checkpoint(packed, config)
    weight = random_weight(32, 64).abs()
    for version, smallest in (("gptq", 1), ("gptq_v2", 0)):
        update = merge_config(config, {"checkpoint_format": version})
        made = GPTQ_FORMAT.quantize(weight, update, random_stats(64))
        assert made.zero is not None and int(made.zero.min()) == smallest
        GPTQ_FORMAT.to_checkpoint(made, update)


@pytest.mark.parametrize(
    ("shape", "group", "expected"),
    [
        ((64, 256), 128, 128),
        ((64, 192), 128, 64),
        ((64, 96), 128, 32),
        ((64, 96), -1, -1),
        ((64, 40), 32, -1),
        ((64, 1000), 128, -1),
        ((64, 172), 128, None),
        ((12, 256), 128, None),
    ],
)
def test_fit(shape: tuple[int, int], group: int, expected: int | None) -> None:
    fit = GPTQ_FORMAT.fit(shape, GPTQConfig(group_size=group))
    if expected is None:
        assert fit.config is None and "32-bit words" in fit.note
    else:
        assert fit.config is not None and fit.config.group_size == expected
        assert (fit.note == "") == (expected == group)
        packed = GPTQ_FORMAT.quantize(random_weight(*shape), fit.config, random_stats(shape[1]))
        assert dequantize(packed).shape == shape


def break_tensor(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    t = dict(tensors)
    suffix, _, change = how.partition(" ")
    if change == "gone":
        del t[suffix]
    elif change == "dtype":
        t[suffix] = t[suffix].to(torch.int64 if suffix == "qweight" else torch.float64)
    elif change == "short":
        t[suffix] = t[suffix][:-1]
    elif change == "flat":
        t[suffix] = t[suffix].flatten()
    elif change in ("nan", "inf", "negative", "range"):
        t[suffix] = t[suffix].clone()
        t[suffix].view(-1)[3] = {"nan": float("nan"), "inf": float("inf"), "negative": -1, "range": 3}[change]
    elif change == "uneven":
        t[suffix] = t[suffix].clone()
        t[suffix][0] = 2
    return t


@pytest.mark.parametrize(
    "how",
    [
        *(f"{s} {c}" for s in ("qweight", "qzeros", "scales") for c in ("gone", "dtype", "short", "flat")),
        "scales nan",
        "scales inf",
        "g_idx dtype",
        "g_idx short",
        "g_idx negative",
        "g_idx range",
        "g_idx uneven",
    ],
)
def test_hostile_tensors(how: str) -> None:
    config = GPTQConfig(group_size=32)
    tensors = GPTQ_FORMAT.to_checkpoint(
        GPTQ_FORMAT.quantize(random_weight(32, 96), config, random_stats(96)), config
    )
    GPTQ_FORMAT.from_checkpoint(tensors, config, (32, 96))
    with pytest.raises(CheckpointError, match=how.split()[0]) as caught:
        GPTQ_FORMAT.from_checkpoint(break_tensor(tensors, how), config, (32, 96))
    assert "\n" not in str(caught.value)


def test_missing_or_empty_g_idx_means_no_reordering() -> None:
    config = GPTQConfig(group_size=32)
    tensors = GPTQ_FORMAT.to_checkpoint(
        GPTQ_FORMAT.quantize(random_weight(32, 96), config, random_stats(96)), config
    )
    whole = dequantize(GPTQ_FORMAT.from_checkpoint(tensors, config, (32, 96)))
    for value in (None, torch.empty(0, dtype=torch.int32)):
        parts = (
            {**tensors, "g_idx": value}
            if value is not None
            else {k: v for k, v in tensors.items() if k != "g_idx"}
        )
        assert torch.equal(dequantize(GPTQ_FORMAT.from_checkpoint(parts, config, (32, 96))), whole)


def test_config_round_trip() -> None:
    config = GPTQConfig(bits=4)
    eight = merge_config(config, {"bits": 8, "group_size": 64})
    layers = QuantizedLayers(
        config,
        quantized={
            **{f"model.layers.0.self_attn.{p}_proj": eight for p in "qkv"},
            "model.layers.0.self_attn.o_proj": config,
            "model.layers.1.mlp.down_proj": eight,
        },
        skipped={
            "lm_head": "asked",
            "model.layers.0.mlp.gate_proj": "shape",
            "model.layers.0.mlp.up_proj": "shape",
        },
    )
    mapping = GPTQ_FORMAT.to_hf_config(layers)
    assert GPTQ_FORMAT.extra_files(layers) == {"quantize_config.json": mapping}
    assert json.loads(json.dumps(mapping)) == mapping
    assert mapping["checkpoint_format"] == mapping["format"] == "gptq" and mapping["lm_head"] is False
    assert mapping["meta"]["quantizer"][0].startswith("quantkit:")
    # optimum matches endings: gate_proj and up_proj are skipped everywhere here
    assert sorted(mapping["modules_in_block_to_quantize"][0]) == sorted(
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"]
    )
    some = QuantizedLayers(
        config, quantized={"m.layers.1.mlp.up": config}, skipped={"m.layers.0.mlp.up": "asked"}
    )
    assert GPTQ_FORMAT.to_hf_config(some)["modules_in_block_to_quantize"] == [["m.layers.1.mlp.up"]]
    assert "modules_in_block_to_quantize" not in GPTQ_FORMAT.to_hf_config(
        QuantizedLayers(config, skipped={"lm_head": "default"})
    )
    dynamic = mapping["dynamic"]
    # vLLM looks the fused names up; names that only begin alike are not touched
    for name, expected in {
        "model.layers.0.self_attn.q_proj": eight,
        "model.layers.0.self_attn.qkv_proj": eight,
        "model.layers.0.mlp.gate_up_proj": "skip",
        "model.layers.0.mlp.gate_proj": "skip",
        "model.layers.1.mlp.down_proj": eight,
        "model.layers.11.mlp.down_proj": config,
        "model.layers.0.self_attn.o_proj": config,
    }.items():
        found = next(((p, c) for p, c in dynamic.items() if re.match(p[2:], name)), ("", {}))
        if expected == "skip":
            assert found[0].startswith("-:")
        else:
            assert found[1] == ({"bits": 8, "group_size": 64} if expected is eight else {})
    experts = [f"model.layers.{i}.mlp.experts.{j}.down_proj" for i in range(3) for j in range(40)]
    many = QuantizedLayers(
        config, quantized={**dict.fromkeys(experts, eight), "model.layers.0.mlp.x1_proj": config}
    )
    assert GPTQ_FORMAT.to_hf_config(many)["dynamic"] == {
        r"+:^model\.layers\.\d+\.mlp\.experts\.\d+\.down_proj$": {"bits": 8, "group_size": 64}
    }
    many.quantized[experts[7]] = config
    assert len(GPTQ_FORMAT.to_hf_config(many)["dynamic"]) == 119
    read = get_layout("gptq").from_hf_config(mapping)
    assert (read.config.bits, read.config.group_size, read.config.version) == (4, 128, 1)
    q_proj = read.config_for("model.layers.0.self_attn.q_proj")
    assert (q_proj.bits, q_proj.group_size, q_proj.version) == (8, 64, 1)
    assert read.config_for("model.layers.11.mlp.down_proj") == read.config


def test_asymmetric_files_are_v2() -> None:
    assert GPTQConfig().version == 1 and GPTQConfig(sym=False).version == 2
    assert GPTQConfig(sym=False, checkpoint_format="gptq").version == 1
    mapping = GPTQ_FORMAT.to_hf_config(QuantizedLayers(GPTQConfig(sym=False)))
    assert mapping["checkpoint_format"] == "gptq_v2" and "dynamic" not in mapping
    assert GPTQ_FORMAT.check_overrides(GPTQConfig(), GPTQConfig(bits=8)) == ""
    assert "gptq_v2" in GPTQ_FORMAT.check_overrides(GPTQConfig(), GPTQConfig(sym=False))


BASE = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"bits": 5}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"bits": True}, "bits"),
        ({"bits": None}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 7}, "group_size"),
        ({"group_size": 64.5}, "group_size"),
        ({"desc_act": "yes"}, "desc_act"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"checkpoint_format": ["gptq"]}, "checkpoint_format"),
        ({"is_marlin_format": True}, "checkpoint_format"),
        ({"pack_dtype": "int16"}, "pack_dtype"),
        ({"dynamic": ["x"]}, "dynamic"),
        ({"dynamic": {"+:(": {"bits": 8}}}, "dynamic"),
        ({"dynamic": {"+:(a+)+$": {"bits": 8}}}, "too long to match"),
        ({"dynamic": {"(a|aa)*!": {"bits": 8}}}, "too long to match"),
        ({"dynamic": {"a?" * 40 + "a" * 40: {"bits": 8}}}, "too long to match"),
        ({"dynamic": {".*.*.*.*.*!": {"bits": 8}}}, "too long to match"),
        ({"dynamic": {"(a|a)" * 40: {"bits": 8}}}, "too long to match"),
        ({"dynamic": {"x" * 5000: {"bits": 8}}}, "dynamic"),
        ({"dynamic": {"model": {"bits": 16}}}, "dynamic"),
        ({"dynamic": {"model": 3}}, "dynamic"),
    ],
)
def test_hostile_config(change: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        GPTQ_FORMAT.from_hf_config({**BASE, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(?:1[0-5])\..*",
        r"+:.*\.(?:1[6-9]|20|21)\..*(?:gate|up|down)_proj.*",
        r"+:^model\.layers\.(0|1|2|3|4|5|6|7|8|9|10)\.mlp\.(gate|up)_proj$",
        "+:^" + re.escape("model.layers.0.mlp.experts.117.down_proj") + "$",
        r"model\.layers\.\d+\.self_attn",
        r"lm_head[^*+]?",
    ],
)
def test_patterns_in_use_are_accepted(pattern: str) -> None:
    read = GPTQ_FORMAT.from_hf_config({**BASE, "dynamic": {pattern: {"bits": 8}}})
    assert read.overrides[0][1].bits == 8


def test_missing_keys_and_old_files() -> None:
    for key in ("bits", "group_size"):
        with pytest.raises(ConfigError, match=f"{key} is missing"):
            GPTQ_FORMAT.from_hf_config({k: v for k, v in BASE.items() if k != key})
    old = GPTQ_FORMAT.from_hf_config(
        {
            "bits": 4,
            "group_size": 128,
            "damp_percent": 0.01,
            "desc_act": True,
            "use_cuda_fp16": True,
            "dynamic": None,
        }
    )
    assert old.config.version == 1 and old.config.desc_act
    skip = GPTQ_FORMAT.from_hf_config({**BASE, "dynamic": {"-:.*gate.*": {}, "mlp": {"bits": 8}}})
    assert skip.config_for("mlp.down_proj").bits == 8 and skip.config_for("model.mlp").bits == 4


def test_options() -> None:
    with pytest.raises(ValueError, match="group_size must be one of"):
        GPTQConfig(group_size=100)
    with pytest.raises(ValueError, match="static_groups"):
        GPTQConfig(desc_act=True, static_groups=True)
    packed = GPTQ_FORMAT.quantize(
        random_weight(32, 64), GPTQConfig(group_size=32, static_groups=True), random_stats(64)
    )
    assert packed.perm is None
    assert get_format("gptq").name == "gptq"


def write_tokenizer(folder: Path) -> None:
    """gptqmodel loads a tokenizer with every model: words w0 .. w127."""
    vocabulary = {f"w{i}": i for i in range(128)}
    content = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}}
    content |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor"))
    content |= {"decoder": None, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "w0",
        "pad_token": "w0",
        "eos_token": "w1",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_ragged_shapes_end_in_a_short_group_and_a_padded_word(bits: int, sym: bool) -> None:
    """As gptqmodel lays out 172 inputs: ceil(172 * bits / 32) words, ceil(172 / 32) groups."""
    n, k = 44, 172
    weight = torch.randn(n, k)
    plain = GPTQConfig(bits=bits, group_size=32, sym=sym)
    config = GPTQConfig(bits=bits, group_size=32, sym=sym, ragged=True)
    fit = GPTQ_FORMAT.fit((n, k), plain)
    assert fit.config is None or fit.config.group_size != 32  # left out, or one group per row, by default
    assert GPTQ_FORMAT.fit((n, k), config).config == config
    packed = GPTQ_FORMAT.quantize(weight, config, random_stats(k))
    tensors = GPTQ_FORMAT.to_checkpoint(packed, config)
    assert tensors["qweight"].shape == (-(-k * bits // 32), n)
    assert tensors["qzeros"].shape == (6, -(-n * bits // 32)) and tensors["scales"].shape == (6, n)
    spec = GPTQ_FORMAT.checkpoint_spec((n, k), config)
    assert {s: tuple(t.shape) for s, t in tensors.items()} == {s: t.shape for s, t in spec.items()}
    again = GPTQ_FORMAT.from_checkpoint(tensors, config, (n, k))
    assert torch.equal(dequantize(again), dequantize(packed))
    assert (dequantize(packed) - weight).norm() < {2: 0.6, 4: 0.13, 8: 0.01}[bits] * weight.norm()


def test_three_bits_are_never_ragged() -> None:
    assert GPTQ_FORMAT.fit((44, 172), GPTQConfig(bits=3, ragged=True)).config is None


@pytest.mark.parametrize(
    "options, served",
    [
        ({}, True),
        ({"bits": 8}, True),
        ({"bits": 3}, False),
        ({"sym": False}, False),
        ({"desc_act": True}, False),
    ],
)
def test_vllm_is_named_only_for_files_that_it_reads(options: dict, served: bool) -> None:
    """What vLLM 0.32 itself accepts and refuses: docs/peers.md."""
    assert ("vLLM" in GPTQ_FORMAT.readers(GPTQConfig(**options))) is served


@pytest.mark.peer
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 3},
        {"sym": False, "bits": 2},
        {"desc_act": True},
        {"bits": 8},
        {"ragged": True, "group_size": 32},
    ],
)
def test_gptqmodel_reads_what_quantkit_writes(options: dict, tmp_path: Path) -> None:
    """gptqmodel's dequantized weights and logits against quantkit's, on a small random Llama."""
    peers = os.environ.get("QUANTKIT_PEERS")
    script = ROOT / "scripts" / "peers" / "logits.py"
    python = Path(peers or "/nowhere") / "new" / "bin" / "python"
    if not python.exists() or not script.exists():
        pytest.skip("QUANTKIT_PEERS does not name a folder with the environment 'new'")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=84 if options.get("ragged") else 96,
        num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, rope_theta=5000.0,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(small).eval()
    default = GPTQConfig(**{"group_size": 64, **options})
    layers, state = QuantizedLayers(default, skipped={"lm_head": "default"}), {}
    for name, parameter in list(model.state_dict().items()):
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or not module.endswith("_proj"):
            state[name] = parameter.clone()
            continue
        shape = (parameter.shape[0], parameter.shape[1])
        fit = GPTQ_FORMAT.fit(shape, default)
        packed = GPTQ_FORMAT.quantize(parameter, fit.config, random_stats(shape[1]))
        layers.quantized[module] = fit.config
        state |= {f"{module}.{s}": t for s, t in GPTQ_FORMAT.to_checkpoint(packed, fit.config).items()}
        # the owner computes in float16
        parameter.copy_(dequantize(packed).half().float())
    assert any(config.group_size == 32 for config in layers.quantized.values())  # down_proj: dynamic
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**small.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    config["quantization_config"] = GPTQ_FORMAT.to_hf_config(layers)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in GPTQ_FORMAT.extra_files(layers).items():
        (folder / name).write_text(json.dumps(content))
    write_tokenizer(folder)
    ids = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(3))
    np.save(tmp_path / "ids.npy", ids.numpy())
    command = [str(python), str(script), "--loader", "gptqmodel", "--model", str(folder)]
    command += ["--ids", str(tmp_path / "ids.npy"), "--out", str(tmp_path / "logits.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        mine = model(ids).logits.numpy()
    theirs = np.load(tmp_path / "logits.npy")
    assert np.linalg.norm(mine - theirs) / np.linalg.norm(mine) < 3e-3
