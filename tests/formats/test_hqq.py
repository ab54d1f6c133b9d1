"""HQQ checkpoints: against the hqq package in both directions, against float64, odd shapes, hostile tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from quantkit.encoding import Affine, PackedWeight, dequantize
from quantkit.errors import CheckpointError, ConfigError
from quantkit.formats import get_format, get_layout
from quantkit.formats.base import QuantizedLayers
from quantkit.formats.hqq import HQQ, HQQConfig, linear_tag
from quantkit.formats.hqq_tensors import PER_WORD, pack_rows, unpack_rows

BITS = (8, 4, 3, 2, 1)
SHAPE = (40, 128)
FMT = HQQ()


def weight(shape: tuple[int, int] = SHAPE, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def written(config: HQQConfig, shape: tuple[int, int] = SHAPE) -> tuple[PackedWeight, dict[str, Tensor]]:
    packed = FMT.quantize(weight(shape), config, None)
    return packed, FMT.to_checkpoint(packed, config)


def dense_by_hand(tensors: dict[str, Tensor]) -> Tensor:
    """float64 weight from the file's tensors, from the layout's description alone."""
    nbits, group = int(tensors["nbits"]), int(tensors["group_size"])
    n, k = tensors["shape"].tolist()
    rows, per = n * k // group, PER_WORD[nbits]
    words = tensors["W_q"].long()
    codes = torch.empty(rows, group, dtype=torch.float64)
    for row in range(rows):
        slab, word = divmod(row, words.shape[0])
        codes[row] = (words[word] >> (nbits * (per - 1 - slab))) & (2**nbits - 1)
    return ((codes - tensors["zero"].double()) * tensors["scale"].double()).view(n, k)


def test_registered() -> None:
    assert isinstance(get_format("hqq"), HQQ) and isinstance(get_layout("hqq"), HQQ)
    assert FMT.Config().model_dump()["bits"] == 4


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64, -1])
def test_round_trip_and_float64(bits: int, group: int) -> None:
    config = HQQConfig(bits=bits, group_size=group)
    packed, tensors = written(config)
    assert packed.encoding == Affine(bits, 128 if group == -1 else group)
    assert set(tensors) <= set(FMT.suffixes) and set(FMT.markers) <= set(tensors)
    back = FMT.from_checkpoint(tensors, config, SHAPE)
    for name, tensor in packed.tensors().items():
        assert torch.equal(tensor, back.tensors()[name]), name
    assert torch.equal(dequantize(back, torch.float64), dense_by_hand(tensors))
    error = float((dequantize(back) - weight()).norm() / weight().norm())
    assert error < {8: 0.01, 4: 0.13, 3: 0.25, 2: 0.5, 1: 0.8}[bits]


@pytest.mark.parametrize("bits", BITS)
def test_spec_says_what_is_written(bits: int) -> None:
    for shape, config in [
        (SHAPE, HQQConfig(bits=bits)),
        ((64, 172), HQQConfig(bits=bits, compute_dtype="bfloat16")),
        ((24, 80), HQQConfig(bits=bits, group_size=-1, compute_dtype="float32", round_zero=True)),
    ]:
        spec = FMT.checkpoint_spec(shape, config)
        tensors = written(config, shape)[1]
        assert {n: (s.dtype, s.shape) for n, s in spec.items()} == {
            n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()
        }
        assert all(t.is_contiguous() and t.device.type == "cpu" for t in tensors.values())


@pytest.mark.parametrize(
    ("shape", "bits", "asked", "group"),
    [
        ((64, 172), 4, 64, 64),  # straddles: gcd 4, 172 groups
        ((64, 172), 3, 64, 64),
        ((64, 172), 1, 64, 43),  # 172 groups are no multiple of 8
        ((64, 63), 4, 64, 63),  # gcd 1: rows instead
        ((7, 63), 4, 64, None),  # 7 groups cannot be packed in pairs
        ((7, 63), 3, 64, 63),  # 3-bit rows are padded
        ((8, 67), 4, 64, 67),  # prime
        ((8, 1031), 4, 64, None),
        ((1, 64), 4, 64, 32),
        ((1000, 63), 2, 64, 63),
        ((64, 32), 4, 64, 64),  # two rows share a scale, as in hqq
        ((2, 4), 4, 64, None),
    ],
)
def test_policy_for_odd_shapes(shape: tuple[int, int], bits: int, asked: int, group: int | None) -> None:
    config = HQQConfig(bits=bits, group_size=asked)
    fit = FMT.fit(shape, config)
    assert (fit.config.group_size if fit.config else None) == group, fit.note
    if fit.config is None or group != asked or shape[1] % asked:
        assert fit.note
    if fit.config is None:
        with pytest.raises(ValueError, match="cannot store"):
            FMT.quantize(weight(shape), config, None)
        return
    assert FMT.fit(shape, fit.config).config == fit.config
    packed, tensors = written(config, shape)
    back = FMT.from_checkpoint(tensors, HQQConfig(), shape)
    assert torch.equal(dequantize(back), dequantize(packed))
    assert torch.equal(dequantize(back, torch.float64), dense_by_hand(tensors))


def test_overrides_of_any_kind_are_expressible() -> None:
    for override in (HQQConfig(bits=2), HQQConfig(group_size=32), HQQConfig(round_zero=True)):
        assert FMT.check_overrides(HQQConfig(), override) == ""


def test_axis_0_is_refused_with_a_reason() -> None:
    with pytest.raises(ValidationError, match="axis=0 shares a scale between output rows"):
        HQQConfig(axis=0)
    mapping = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "axis": 0}}}
    with pytest.raises(ConfigError, match=r"quant_config\.weight_quant_params\.axis: axis=0"):
        FMT.from_hf_config(mapping)
    with pytest.raises(ValidationError):
        HQQConfig(group_size=0)
    with pytest.raises(ValidationError):
        HQQConfig(bits=5)  # type: ignore[arg-type]


def test_config_json_uniform() -> None:
    names = ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"]
    layers = QuantizedLayers(
        HQQConfig(bits=3, group_size=32),
        dict.fromkeys(names, HQQConfig(bits=3, group_size=32)),
        {"model.layers.0.mlp.gate": "router", "lm_head": "head", "model.layers.0.self_attn.q_proj": "odd"},
    )
    mapping = FMT.to_hf_config(layers)
    weight_params = mapping["quant_config"]["weight_quant_params"]
    assert (weight_params["nbits"], weight_params["group_size"], weight_params["axis"]) == (3, 32, 1)
    # transformers looks for substrings: "gate" would switch "gate_proj" off too.
    assert mapping["skip_modules"] == ["lm_head", "q_proj"]
    assert FMT.from_hf_config(mapping).config_for(names[0]) == HQQConfig(bits=3, group_size=32)


def test_config_json_by_tag() -> None:
    quantized = {f"model.layers.{i}.mlp.up_proj": HQQConfig(bits=4) for i in range(3)}
    quantized |= {f"model.layers.{i}.mlp.down_proj": HQQConfig(bits=8, group_size=128) for i in range(2)}
    quantized["model.layers.2.mlp.down_proj"] = HQQConfig(bits=2)
    quantized["lm_head"] = HQQConfig(bits=8, group_size=-1)
    mapping = FMT.to_hf_config(QuantizedLayers(HQQConfig(), quantized))
    assert set(mapping["quant_config"]) == {"mlp.up_proj", "mlp.down_proj", "lm_head"}
    assert mapping["skip_modules"] == []
    read = FMT.from_hf_config(mapping)
    assert read.config_for("model.layers.17.mlp.up_proj").bits == 4
    assert read.config_for("model.layers.17.mlp.down_proj") == HQQConfig(bits=8, group_size=128)
    assert read.config_for("lm_head") == HQQConfig(bits=8, group_size=-1)
    assert read.config_for("language_model.lm_head") == read.config  # another tag: the default


def test_linear_tags_and_hostile_tags() -> None:
    assert linear_tag("model.layers.31.self_attn.k_proj") == "self_attn.k_proj"
    params = {"weight_quant_params": {"nbits": 2, "group_size": 16}}
    read = FMT.from_hf_config(
        {"quant_config": {"self_attn.k_proj": params, ".".join("0" * 60): params, "x": None}}
    )
    assert len(read.overrides) == 1
    assert read.config_for("model." * 500 + "layers.1.self_attn.k_proj").bits == 2
    assert read.config_for("model.layers.1.self_attn.k_projx") == read.config


@pytest.mark.parametrize(
    "mapping",
    [
        {},
        {"quant_config": None},
        {"quant_config": {}},
        {"quant_config": {"weight_quant_params": 4}},
        {"quant_config": {"weight_quant_params": {"nbits": 7}}},
        {"quant_config": {"weight_quant_params": {"nbits": "4"}}},
        {"quant_config": {"weight_quant_params": {"nbits": float("nan")}}},
        {"quant_config": {"weight_quant_params": {"nbits": True}}},
        {"quant_config": {"weight_quant_params": {"group_size": 0}}},
        {"quant_config": {"weight_quant_params": {"group_size": "64"}}},
        {"quant_config": {"weight_quant_params": {"axis": 2}}},
        {"quant_config": {"mlp.up_proj": 4}},
        {"quant_config": {"mlp.up_proj": None}},
        {"quant_config": {"mlp.up_proj": {"weight_quant_params": {"nbits": 9}}}},
    ],
)
def test_bad_config_is_refused_by_key(mapping: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="quant_config"):
        FMT.from_hf_config(mapping)


def set_to(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, value)


def text(value: str) -> Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


SCALE = torch.full((80, 1), 0.01, dtype=torch.float16)
HOSTILE: list[tuple[str, Callable[[dict[str, Tensor]], Any]]] = [
    ("W_q", lambda t: t.pop("W_q")),
    ("scale", lambda t: t.pop("scale")),
    ("zero", lambda t: t.pop("zero")),
    ("W_q", set_to("W_q", torch.zeros(41, 64, dtype=torch.uint8))),
    ("W_q", set_to("W_q", torch.zeros(40, 64, dtype=torch.int8))),
    ("W_q", set_to("W_q", torch.zeros(40, 64))),
    ("W_q", set_to("W_q", torch.zeros(40 * 64, dtype=torch.uint8))),
    ("scale", set_to("scale", SCALE[:79])),
    ("scale", set_to("scale", SCALE.double())),
    ("scale", set_to("scale", SCALE * math.nan)),
    ("scale", set_to("scale", SCALE.byte())),
    ("zero", set_to("zero", SCALE * math.inf)),
    ("zero", set_to("zero", SCALE.T)),
    ("shape", set_to("shape", torch.tensor([128, 40]))),
    ("shape", set_to("shape", torch.arange(1000))),
    ("nbits", set_to("nbits", torch.tensor(7, dtype=torch.int32))),
    ("nbits", set_to("nbits", torch.tensor(float("nan")))),
    ("nbits", set_to("nbits", torch.tensor([4, 4], dtype=torch.int32))),
    ("packing", set_to("nbits", torch.tensor(2, dtype=torch.int32))),
    ("group_size", set_to("group_size", torch.tensor(48, dtype=torch.int32))),
    ("group_size", set_to("group_size", torch.tensor(0, dtype=torch.int32))),
    ("group_size", set_to("group_size", torch.tensor(-64, dtype=torch.int32))),
    ("axis=0", set_to("axis", torch.tensor(0, dtype=torch.int32))),
    ("axis", set_to("axis", torch.tensor(3, dtype=torch.int32))),
    ("channel_wise", set_to("channel_wise", torch.tensor(0, dtype=torch.uint8))),
    ("quant_scale", set_to("quant_scale", torch.tensor(1, dtype=torch.uint8))),
    ("quant_zero", set_to("quant_zero", torch.tensor(1, dtype=torch.uint8))),
    ("zero_q", set_to("zero_q", torch.zeros(40, 2, dtype=torch.uint8))),
    ("view_as_float", set_to("view_as_float", torch.tensor(1, dtype=torch.uint8))),
    ("optimize", set_to("optimize", torch.tensor(7, dtype=torch.uint8))),
    ("packing", set_to("packing", text("2bit_u8"))),
    ("packing", set_to("packing", text("__import__('os').system('true')"))),
    ("compute_dtype", set_to("compute_dtype", text("exec('raise SystemExit')"))),
    ("compute_dtype", set_to("compute_dtype", text("torch.float64"))),
    ("compute_dtype", set_to("compute_dtype", torch.zeros(10_000, dtype=torch.uint8))),
    ("compute_dtype", set_to("compute_dtype", torch.zeros(5))),
    ("unpack_view_dtype", set_to("unpack_view_dtype", text("torch.int32"))),
]


@pytest.mark.parametrize(("named", "spoil"), HOSTILE)
def test_hostile_tensors_are_refused_by_name(named: str, spoil: Callable[[dict[str, Tensor]], Any]) -> None:
    _, tensors = written(HQQConfig())
    spoil(tensors)
    with pytest.raises(CheckpointError) as error:
        FMT.from_checkpoint(tensors, HQQConfig(), SHAPE)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_hostile_words_of_other_widths() -> None:
    _, tensors = written(HQQConfig(bits=3))
    tensors["W_q"][0, 0] = -1
    with pytest.raises(CheckpointError, match="ten 3-bit codes"):
        FMT.from_checkpoint(tensors, HQQConfig(), SHAPE)
    _, tensors = written(HQQConfig(bits=8))
    tensors["nbits"] = torch.tensor(5, dtype=torch.int32)
    with pytest.raises(CheckpointError, match="beyond 31"):
        FMT.from_checkpoint(tensors, HQQConfig(), SHAPE)


def test_metadata_may_be_absent() -> None:
    """With only the arrays in the file, config.json's options have to do."""
    packed, tensors = written(HQQConfig(bits=2, group_size=32))
    bare = {name: tensors[name] for name in ("W_q", "scale", "zero")}
    back = FMT.from_checkpoint(bare, HQQConfig(bits=2, group_size=32), SHAPE)
    assert torch.equal(dequantize(back), dequantize(packed))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_view_as_float_and_stacked_metadata(bits: int, dtype: torch.dtype) -> None:
    packed, tensors = written(HQQConfig(bits=bits))
    tensors["W_q"] = tensors["W_q"].view(dtype)
    tensors["view_as_float"] = torch.tensor(1, dtype=torch.uint8)
    tensors["zero_scale"] = torch.stack((tensors.pop("zero"), tensors.pop("scale")))
    back = FMT.from_checkpoint(tensors, HQQConfig(), SHAPE)
    assert torch.equal(dequantize(back), dequantize(packed))
    tensors["zero_scale"] = tensors["zero_scale"][:1]
    with pytest.raises(CheckpointError, match="zero_scale"):
        FMT.from_checkpoint(tensors, HQQConfig(), SHAPE)


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_chunk_independent(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 2**bits, (48, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    words = pack_rows(codes, bits)
    monkeypatch.setattr("quantkit.formats.hqq_tensors._CHUNK", 20)
    assert torch.equal(pack_rows(codes, bits), words)
    assert torch.equal(unpack_rows(words, bits, 48), codes)
    if bits in (4, 2, 1):
        with pytest.raises(ValueError, match="multiple"):
            pack_rows(codes[:7], bits)


def test_packed_weights_that_do_not_fit_are_refused() -> None:
    packed, _ = written(HQQConfig(bits=4))
    with pytest.raises(ValueError, match="cannot hold"):
        FMT.to_checkpoint(packed, HQQConfig(bits=8))
    fine = FMT.quantize(weight(), HQQConfig(group_size=32), None)
    with pytest.raises(ValueError, match="differs within a group"):
        FMT.to_checkpoint(fine, HQQConfig(group_size=64))
    with pytest.raises(ValueError, match="do not make up"):
        FMT.to_checkpoint(packed, HQQConfig(group_size=32))


# --- against the hqq package -------------------------------------------------------------------------


def hqq_layer(shape: tuple[int, int], bits: float, group: int, dtype: torch.dtype, **more: Any) -> Any:
    quantize = pytest.importorskip("hqq.core.quantize")
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data = weight(shape)
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
    config["weight_quant_params"].update(more)
    return quantize.HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


@pytest.mark.peer
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("shape", "group"), [(SHAPE, 64), (SHAPE, 32), ((64, 172), 64), ((64, 63), 56), ((64, 32), 64)]
)
def test_reads_what_hqq_wrote(bits: int, shape: tuple[int, int], group: int) -> None:
    if bits == 1 and shape == (64, 172):
        pytest.skip("hqq cannot pack 172 groups at 1 bit")
    layer = hqq_layer(shape, bits, group, torch.float32)
    state = dict(layer.state_dict())
    packed = FMT.from_checkpoint(state, HQQConfig(), shape)
    assert torch.equal(dequantize(packed), layer.dequantize())
    # Written again, the file is the same, byte for byte.
    config = HQQConfig(bits=bits, group_size=group, compute_dtype="float32", round_zero=bits == 4)
    again = FMT.to_checkpoint(packed, config)
    assert set(again) == set(state)
    for name, tensor in again.items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name].data), name


@pytest.mark.peer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reads_other_settings_of_hqq(dtype: torch.dtype) -> None:
    for bits, more in (
        (5, {}),
        (6, {}),
        (1.58, {}),
        (4, {"view_as_float": True}),
        (3, {"view_as_float": True}),
    ):
        layer = hqq_layer(SHAPE, bits, 64, dtype, **more)
        state = dict(layer.state_dict())
        packed = FMT.from_checkpoint(state, HQQConfig(), SHAPE)
        exact = layer.dequantize()
        assert torch.allclose(dequantize(packed), exact.float(), atol=2e-2 * float(exact.abs().max()))
        reread = dict(state)
        fresh = type(layer)(None, None, compute_dtype=torch.float32, device="cpu")
        fresh.load_state_dict(reread)
        assert torch.equal(dequantize(packed), fresh.dequantize())
    state = dict(hqq_layer(SHAPE, 4, 64, dtype, axis=0).state_dict())
    with pytest.raises(CheckpointError, match="axis=0"):
        FMT.from_checkpoint(state, HQQConfig(), SHAPE)


@pytest.mark.peer
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [SHAPE, (64, 172), (64, 63)])
@pytest.mark.parametrize("compute_dtype", ["auto", "bfloat16", "float32"])
def test_hqq_reads_what_we_wrote(bits: int, shape: tuple[int, int], compute_dtype: Any) -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    packed, tensors = written(HQQConfig(bits=bits, compute_dtype=compute_dtype), shape)
    layer = quantize.HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
    assert set(tensors) | {"bias"} == layer.state_dict_keys()
    layer.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
    assert torch.equal(layer.dequantize(), dequantize(packed))
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(2))
    assert torch.allclose(layer(x), x @ dequantize(packed).T, atol=1e-6)


@pytest.mark.peer
@pytest.mark.parametrize("bits", BITS)
def test_same_size_as_hqq(bits: int) -> None:
    state = hqq_layer(SHAPE, bits, 64, torch.float16).state_dict()
    spec = FMT.checkpoint_spec(SHAPE, HQQConfig(bits=bits))
    assert sum(s.nbytes for s in spec.values()) == sum(t.numel() * t.element_size() for t in state.values())
