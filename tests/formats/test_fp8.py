"""fp8: bit-identity with transformers and llm-compressor, the maths in float64, odd shapes, refusals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit.algorithms import float8
from quantkit.encoding import Float8, PackedWeight, dequantize
from quantkit.errors import CalibrationError, CheckpointError, ConfigError, NumericsError
from quantkit.formats import get_layout
from quantkit.formats.base import LayerStats, Needs, QuantizedLayers, take_notes
from quantkit.formats.fp8 import FP8, FP8Config

FMT = FP8()
GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
ALL = [
    {"scheme": "block"},
    {"scheme": "tensor"},
    {"scheme": "block", "activation": "static"},
    {"scheme": "tensor", "activation": "static"},
    {"scheme": "block", "layout": "compressed-tensors"},
    {"scheme": "channel", "layout": "compressed-tensors"},
    {"scheme": "tensor", "layout": "compressed-tensors", "activation": "static"},
    {"scheme": "channel", "layout": "compressed-tensors", "activation": "none"},
]


def weights(shape, dtype="float32", seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(shape[0], 1, generator=generator)
    return (torch.randn(shape, generator=generator) * rows).to(getattr(torch, dtype))


def stats(columns):
    return LayerStats(tokens=7, abs_max=torch.linspace(0.5, 13.25, columns))


def read_back(tensors, config, shape):
    written = FMT.to_hf_config(QuantizedLayers(config, {"a.b": config}, {"lm_head": "asked"}))
    layout = get_layout(written["quant_method"])
    return layout.from_checkpoint(tensors, layout.from_hf_config(written).config_for("a.b"), shape)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files")
def test_golden_llm_compressor_from_its_source():
    golden = load_file(GOLDEN / "ct_llama_FP8_DYNAMIC" / "model.safetensors")
    source = load_file(GOLDEN / "sources" / "llama" / "model.safetensors")
    config = FP8Config(scheme="channel", layout="compressed-tensors", compute_dtype="bfloat16")
    layers = [n.removesuffix("_scale") for n in golden if n.endswith("weight_scale")]
    assert len(layers) == 28
    for name in layers:
        mine = FMT.to_checkpoint(FMT.quantize(source[name].float(), config, None), config)
        assert mine["weight_scale"].dtype == torch.bfloat16
        assert torch.equal(mine["weight_scale"], golden[name + "_scale"])
        assert torch.equal(mine["weight"].view(torch.uint8), golden[name].view(torch.uint8))


@pytest.mark.parametrize("block", [[128, 128], [64, 32], None])
def test_bit_identical_to_transformers_quantize_on_load(block):
    owner = pytest.importorskip("transformers.integrations.finegrained_fp8")

    class Quantizer:
        class quantization_config:
            weight_block_size = block
            scale_fmt = "float"

    weight = weights((256, 384), "bfloat16")
    weight[:128, :128] = 0
    weight[130, 200] = -0.0
    weight[0, 300] = 90
    theirs = owner.Fp8Quantize(Quantizer()).convert({"a.weight": weight})
    options = {"scheme": "tensor"} if block is None else {"block_rows": block[0], "block_cols": block[1]}
    mine = FMT.to_checkpoint(FMT.quantize(weight.float(), FP8Config(**options), None), FP8Config(**options))
    assert torch.equal(mine["weight"].view(torch.uint8), theirs["a.weight"].view(torch.uint8))
    assert torch.equal(mine["weight_scale_inv"].flatten(), theirs["a.weight_scale_inv"].flatten())


@pytest.mark.parametrize("options", [{"scheme": "block"}, {"scheme": "tensor"}])
@pytest.mark.parametrize("shape", [(256, 384), (100, 128), (64, 40)])
def test_transformers_dequantizes_what_fit_allows(shape, options):
    owner = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = FMT.fit(shape, FP8Config(**options)).config
    packed = FMT.quantize(weights(shape), config, None)
    tensors = FMT.to_checkpoint(packed, config)
    theirs = owner.Fp8Dequantize(None).convert(tensors | {"weight": tensors["weight"]})["weight"]
    assert torch.equal(theirs, dequantize(packed))


def test_transformers_misreads_what_fit_refuses():
    """The reason for `partial_blocks=skip`; when this fails the owner changed and the policy can go."""
    owner = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = FP8Config(partial_blocks="write")
    weight = weights((200, 128))
    weight[128:] *= 10  # the second tile of rows has a scale of its own
    packed = FMT.quantize(weight, config, None)
    assert tuple(packed.scale.shape) == (2, 1)
    theirs = owner.Fp8Dequantize(None).convert(FMT.to_checkpoint(packed, config))["weight"]
    assert not torch.allclose(theirs, dequantize(packed), rtol=0.1)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("shape", [(63, 1000), (200, 300), (1, 5), (128, 128)])
@pytest.mark.parametrize("options", ALL, ids=lambda o: "-".join(o.values()))
def test_round_trip_odd_shapes_in_float64(options, shape, search):
    config = FP8Config(partial_blocks="write", scale_search=search, compute_dtype="bfloat16", **options)
    weight = weights(shape, "bfloat16", seed=shape[0]).float()
    packed = FMT.quantize(weight, config, stats(shape[1]))
    tensors = FMT.to_checkpoint(packed, config)
    spec = FMT.checkpoint_spec(shape, config)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == {
        k: (s.dtype, s.shape) for k, s in spec.items()
    }
    read = read_back(tensors, config, shape)
    assert torch.equal(dequantize(read), dequantize(packed))
    assert read.activation == packed.activation

    scale = packed.scale.double()
    bn, bk = packed.encoding.block
    wide = scale.repeat_interleave(bn, 0)[: shape[0]].repeat_interleave(bk, 1)[:, : shape[1]]
    value = tensors["weight"].double() * wide
    # dequantize multiplies in float32: one rounding.
    torch.testing.assert_close(dequantize(packed).double(), value, rtol=2**-23, atol=0)
    # Half a step of e4m3 (2**-4 relative, 2**-10 below 2**-6), plus bfloat16's rounding of the quotient
    # (2**-9 relative); a searched or bfloat16-rounded scale may clip the largest weights.
    clipped = weight.double().abs() > 448 * wide
    bound = weight.double().abs() * (2**-4 + 2**-8) + wide * 2**-10 * 1.01
    assert ((value - weight.double()).abs() <= bound)[~clipped].all()
    assert clipped.double().mean() < 0.02 or weight.numel() < 100
    if config.activation == "static":
        # 13.25 / 448, rounded to the scale's dtype.
        assert float(read.input_scale) == pytest.approx(13.25 / 448, rel=2**-8)


@pytest.mark.parametrize("options", ALL[:2] + ALL[4:6], ids=lambda o: "-".join(o.values()))
def test_scale_search_is_never_worse(options):
    weight = weights((200, 300), "bfloat16", seed=4).float()
    errors = []
    for search in (False, True):
        config = FP8Config(scale_search=search, partial_blocks="write", compute_dtype="bfloat16", **options)
        errors.append(float((dequantize(FMT.quantize(weight, config, None)) - weight).square().sum()))
    assert errors[1] < (0.93 if options["scheme"] == "channel" else 1.0) * errors[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("extreme", [0.0, 1e-40, 1e30, 3e38])
@pytest.mark.parametrize("options", ALL, ids=lambda o: "-".join(o.values()))
def test_extreme_weights_stay_finite(options, extreme, dtype):
    for search in (False, True):
        config = FP8Config(partial_blocks="write", compute_dtype=dtype, scale_search=search, **options)
        for fill in (0.0, 1.0):
            weight = weights((40, 140)) * fill
            weight[3, 5] = extreme
            packed = FMT.quantize(weight, config, stats(140))
            read = read_back(FMT.to_checkpoint(packed, config), config, (40, 140))
            assert torch.isfinite(dequantize(read)).all()
            assert (read.scale > 0).all()
    take_notes()


def test_tiles_are_independent():
    """An outlier changes the codes of its own tile only, for all three schemes."""
    weight = weights((256, 256))
    loud = weight.clone()
    loud[5, 7] = 100.0
    for block, touched in (((128, 128), (128, 128)), ((1, 256), (1, 256)), ((256, 256), (256, 256))):
        a, _ = float8.quantize_float32(weight, block)
        b, _ = float8.quantize_float32(loud, block)
        differs = (a != b).nonzero()
        first_row = 5 if block[0] == 1 else 0
        assert differs[:, 0].min() >= first_row and differs[:, 0].max() < first_row + touched[0]
        assert differs[:, 1].max() < touched[1]


def test_all_256_bytes_decode_and_encode():
    every = torch.arange(256, dtype=torch.uint8)
    value = every.view(torch.float8_e4m3fn).float()
    known = ~torch.isnan(value)
    assert int(known.sum()) == 254
    assert torch.equal(float8.to_e4m3(value[known]), every[known])
    assert torch.equal(
        float8.to_e4m3(torch.tensor([1e9, -1e9])), torch.tensor([0x7E, 0xFE], dtype=torch.uint8)
    )


def test_fit_states_the_policy():
    config = FP8Config()
    assert FMT.fit((256, 384), config).config is config
    assert FMT.fit((100, 128), config).config is config  # one tile, cut off: read the same by everyone
    skipped = FMT.fit((576, 512), config)
    assert skipped.config is None and "576 rows" in skipped.note
    written = FMT.fit((576, 512), FP8Config(partial_blocks="write"))
    assert written.config is not None and "576 rows" in written.note
    assert FMT.fit((576, 500), FP8Config(scheme="tensor")).note == ""
    ct = FP8Config(layout="compressed-tensors")
    assert FMT.fit((576, 512), ct).config is ct and FMT.fit((576, 500), ct).config is None


def test_static_needs_calibration():
    config = FP8Config(activation="static")
    assert FMT.needs(config) is Needs.HESSIAN and FMT.needs(FP8Config()) is Needs.NONE
    with pytest.raises(CalibrationError):
        FMT.quantize(weights((8, 8)), config, None)
    take_notes()
    unused = LayerStats(tokens=0, abs_max=torch.zeros(8))
    assert float(FMT.quantize(weights((8, 8)), config, unused).input_scale) == 1.0
    assert "no calibration token" in take_notes()[0]
    with pytest.raises(NumericsError):
        FMT.quantize(weights((8, 8)), config, LayerStats(tokens=1, abs_max=torch.full((8,), float("inf"))))
    with pytest.raises(CheckpointError, match="activation_scale"):
        FMT.to_checkpoint(FMT.quantize(weights((8, 8)), FP8Config(), None), config)


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "channel"},
        {"activation": "none"},
        {"layout": "compressed-tensors", "activation": "static"},
        {"block_rows": 0},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError):
        FP8Config(**options)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("weight_scale_inv"), "weight_scale_inv is missing"),
        (lambda t: t.update(weight=t["weight"].view(torch.uint8)), "weight has dtype uint8"),
        (lambda t: t.update(weight=t["weight"][:-1]), "weight has shape"),
        (lambda t: t["weight"].view(torch.uint8)[3].fill_(0xFF), "weight holds NaN"),
        (lambda t: t.update(weight_scale_inv=t["weight_scale_inv"].T), "weight_scale_inv has shape"),
        (lambda t: t["weight_scale_inv"].fill_(float("inf")), "NaN or Inf"),
        (lambda t: t.update(weight_scale_inv=torch.full((2, 3), 255, dtype=torch.uint8)), "NaN or Inf"),
        (lambda t: t["activation_scale"].zero_(), "not above zero"),
        (lambda t: t.pop("activation_scale"), "activation_scale is missing"),
    ],
)
def test_hostile_tensors_are_refused(change, says):
    config = FP8Config(activation="static")
    tensors = FMT.to_checkpoint(FMT.quantize(weights((256, 384)), config, stats(384)), config)
    FMT.from_checkpoint(tensors, config, (256, 384))
    change(tensors)
    with pytest.raises(CheckpointError, match=says):
        FMT.from_checkpoint(tensors, config, (256, 384))


def test_power_of_two_scales_are_read():
    codes = torch.randint(0, 120, (256, 128), dtype=torch.uint8)
    exponents = torch.tensor([[120], [131]], dtype=torch.uint8)
    tensors = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": exponents}
    read = FMT.from_checkpoint(tensors, FP8Config(), (256, 128))
    assert read.scale.flatten().tolist() == [2.0**-7, 2.0**4]
    tensors["weight_scale_inv"] = exponents.view(torch.float8_e8m0fnu)
    assert torch.equal(dequantize(FMT.from_checkpoint(tensors, FP8Config(), (256, 128))), dequantize(read))


@pytest.mark.parametrize(
    ("mapping", "key"),
    [
        ({"activation_scheme": "per_tensor"}, "activation_scheme"),
        ({"activation_scheme": 3}, "activation_scheme"),
        ({"weight_block_size": [128]}, "weight_block_size"),
        ({"weight_block_size": [128, 0]}, "weight_block_size"),
        ({"weight_block_size": "128"}, "weight_block_size"),
        ({"fmt": "e5m2"}, "fmt"),
        ({"expert_dtype": "fp4"}, "expert_dtype"),
        ({"modules_to_convert": ["embed"]}, "modules_to_convert"),
    ],
)
def test_hf_config_refusals_name_the_key(mapping, key):
    with pytest.raises(ConfigError, match=key):
        FMT.from_hf_config(mapping)


def test_hf_config_accepts_owner_spellings():
    read = FMT.from_hf_config({"fmt": "e4m3", "weight_block_size": [128, 128], "new": 1}).config
    assert (read.scheme, read.activation) == ("block", "dynamic")
    assert (
        FMT.from_hf_config({"weight_block_size": None, "activation_scheme": "STATIC"}).config.scheme
        == "tensor"
    )


def test_transformers_accepts_the_written_config():
    config_class = pytest.importorskip("transformers").FineGrainedFP8Config
    for options in ({}, {"scheme": "tensor"}, {"activation": "static"}):
        config = FP8Config(**options)
        written = FMT.to_hf_config(QuantizedLayers(config, {"a": config}, {"lm_head": ""}))
        parsed = config_class.from_dict(dict(written))
        assert parsed.activation_scheme == config.activation
        assert parsed.weight_block_size == ([128, 128] if config.scheme == "block" else None)
        assert parsed.modules_to_not_convert == ["lm_head"]


def test_overrides():
    ct = {"layout": "compressed-tensors"}
    assert FMT.check_overrides(FP8Config(), FP8Config(scale_search=True)) == ""
    assert "scheme" in FMT.check_overrides(FP8Config(), FP8Config(scheme="tensor"))
    assert "layout" in FMT.check_overrides(FP8Config(), FP8Config(**ct))
    assert FMT.check_overrides(FP8Config(**ct), FP8Config(scheme="channel", **ct)) == ""


def test_weight_of_another_dtype_uses_exact_arithmetic():
    """Nobody to match bit for bit: the quotient is not rounded to bfloat16 first."""
    weight = weights((64, 96))
    config = FP8Config(scheme="channel", layout="compressed-tensors", compute_dtype="bfloat16")
    packed = FMT.quantize(weight, config, None)
    quotient = weight.double() / packed.scale.double()
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[~grid.isnan()]
    best = (quotient.unsqueeze(-1) - grid).abs().amin(-1)
    mine = (packed.codes.view(torch.float8_e4m3fn).double() - quotient).abs()
    assert (mine - best).max() <= 448 * 2**-23  # float32 quotient
    assert isinstance(packed, PackedWeight) and packed.encoding == Float8((1, 96))
