"""NF4/FP4: bit-identity with bitsandbytes on a CPU, the maths in float64, and hostile files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit.algorithms import codebook
from quantkit.encoding import Codebook, PackedWeight, dequantize
from quantkit.errors import CheckpointError, ConfigError, NumericsError
from quantkit.formats.base import QuantizedLayers, take_notes
from quantkit.formats.nf4 import BLOCK_SIZES, NF4, NF4Config

FMT = NF4()
GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
STATE = "weight.quant_state.bitsandbytes__"
SHAPES = [(63, 1000), (7, 13), (96, 128), (1, 1), (5, 64), (130, 257)]


def weights(shape, dtype="float32", seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(shape[0], 1, generator=generator)
    return (torch.randn(shape, generator=generator) * rows).to(getattr(torch, dtype))


def same_bytes(mine, theirs):
    assert set(mine) == set(theirs)
    for suffix, tensor in theirs.items():
        got = mine[suffix]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), suffix
        assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), suffix


def checkpoint(shape=(12, 40), **options):
    config = NF4Config(block_size=32, compute_dtype="bfloat16", **options)
    return FMT.to_checkpoint(FMT.quantize(weights(shape), config, None), config), config


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files")
def test_golden_checkpoint_from_its_source():
    golden = load_file(GOLDEN / "nf4_llama_dq1_bfloat16" / "model.safetensors")
    source = load_file(GOLDEN / "sources" / "llama" / "model.safetensors")
    config = NF4Config(compute_dtype="bfloat16")
    layers = sorted(n.removesuffix(".weight.absmax") for n in golden if n.endswith(".weight.absmax"))
    assert len(layers) == 28
    for layer in layers:
        theirs = {n.removeprefix(layer + "."): t for n, t in golden.items() if n.startswith(layer + ".")}
        weight = source[layer + ".weight"]
        same_bytes(FMT.to_checkpoint(FMT.quantize(weight.float(), config, None), config), theirs)
        read = FMT.from_checkpoint(theirs, NF4Config(double_quant=False), tuple(weight.shape))
        same_bytes(FMT.to_checkpoint(read, NF4Config(double_quant=False)), theirs)  # the file's own nesting
        # NF4 of Gaussian weights: relative error about 0.09; 0.12 would already be another format.
        assert (dequantize(read) - weight.float()).norm() < 0.12 * weight.float().norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bit_identical_to_bitsandbytes(quant_type, block_size, dtype):
    owner = pytest.importorskip("bitsandbytes.functional")
    for i, shape in enumerate(SHAPES):
        weight = weights(shape, dtype, seed=block_size + i)
        if shape == (96, 128):  # zero blocks, a negative zero, an outlier, exact ties
            weight[3:40] = 0
            weight[50, 3] = -0.0
            weight[60, 60] = 55
            weight[61] = torch.linspace(-1, 1, 128).to(weight.dtype)
        for nested in (False, True):
            packed, state = owner.quantize_4bit(
                weight, blocksize=block_size, compress_statistics=nested, quant_type=quant_type
            )
            theirs = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
            config = NF4Config(
                quant_type=quant_type, block_size=block_size, double_quant=nested, compute_dtype=dtype
            )
            same_bytes(FMT.to_checkpoint(FMT.quantize(weight.float(), config, None), config), theirs)
            read = FMT.from_checkpoint(theirs, NF4Config(), shape)
            same_bytes(FMT.to_checkpoint(read, config), theirs)


@pytest.mark.parametrize("shape", [(64, 256), (48, 100), (33, 66)])
@pytest.mark.parametrize("nested", [False, True])
def test_owner_computes_the_same_layer(shape, nested):
    bnb = pytest.importorskip("bitsandbytes")
    config = NF4Config(double_quant=nested, compute_dtype="float32")
    packed = FMT.quantize(weights(shape), config, None)
    tensors = FMT.to_checkpoint(packed, config)
    stats = {k.removeprefix("weight."): v for k, v in tensors.items() if k != "weight"}
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit.from_prequantized(tensors["weight"], stats, device="cpu", module=layer)
    x = weights((5, shape[1]), seed=9)
    # Two float32 matrix products that differ in summation order only.
    torch.testing.assert_close(layer(x), x @ dequantize(packed).t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_nearest_in_float64(shape, quant_type):
    weight = weights(shape, seed=3)
    config = NF4Config(quant_type=quant_type, block_size=64, double_quant=False)
    tensors = FMT.to_checkpoint(FMT.quantize(weight, config, None), config)
    flat = weight.double().reshape(-1)
    codes = torch.stack([tensors["weight"].view(-1) >> 4, tensors["weight"].view(-1) & 15], 1).view(-1)
    absmax = tensors["weight.absmax"].double().repeat_interleave(64)[: flat.numel()]
    lut = tensors["weight.quant_map"].double()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 64)).view(-1, 64)
    torch.testing.assert_close(tensors["weight.absmax"].double(), padded.abs().amax(1), rtol=0, atol=0)
    mine = (lut[codes[: flat.numel()].long()] - flat / absmax).abs()
    best = (lut.view(1, -1) - (flat / absmax).view(-1, 1)).abs().amin(1)
    assert (mine - best).max() < 2e-7  # float32 rounding of a value in [-1, 1] moves ties only


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_round_trip_and_spec(quant_type, nested):
    for i, shape in enumerate(SHAPES):
        config = NF4Config(quant_type=quant_type, double_quant=nested, block_size=32, compute_dtype="float16")
        packed = FMT.quantize(weights(shape, seed=i), config, None)
        tensors = FMT.to_checkpoint(packed, config)
        read = FMT.from_checkpoint(tensors, NF4Config(), shape)
        assert torch.equal(dequantize(read), dequantize(packed))
        spec = FMT.checkpoint_spec(shape, config)
        assert set(spec) == set(tensors)
        for suffix, want in spec.items():
            assert tensors[suffix].dtype == want.dtype
            if not suffix.startswith(STATE):
                assert tuple(tensors[suffix].shape) == want.shape


def test_plain_packed_weight_is_nested_when_written():
    plain, config = weights((32, 64)), NF4Config(double_quant=True)
    packed = FMT.quantize(plain, NF4Config(double_quant=False), None)
    bare = PackedWeight(Codebook(4, 64), packed.shape, packed.codes, packed.scale, lut=packed.lut)
    read = FMT.from_checkpoint(FMT.to_checkpoint(bare, config), config, (32, 64))
    assert read.nested is not None
    # Eight-bit dynamic codes of the centred absmax: steps of at most 1.4% of the largest deviation.
    spread = (packed.scale - packed.scale.mean()).abs().max()
    assert (read.scale - packed.scale).abs().max() <= 0.0075 * spread


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_scale_search_lowers_the_error(quant_type, nested):
    weight = weights((64, 1000), seed=5)
    errors = []
    for search in (False, True):
        config = NF4Config(quant_type=quant_type, double_quant=nested, scale_search=search)
        tensors = FMT.to_checkpoint(FMT.quantize(weight, config, None), config)
        errors.append((dequantize(FMT.from_checkpoint(tensors, config, (64, 1000))) - weight).square().sum())
    assert errors[1] < 0.97 * errors[0]


def test_searched_scales_are_never_worse_per_block():
    flat = torch.cat([weights((40, 64), seed=6).view(-1), torch.zeros(64), weights((1, 17)).view(-1)])
    lut = codebook.table("nf4")
    plain = codebook.block_absmax(flat, 64)
    found = codebook.search_absmax(flat, plain, lut, 64)

    def error(scale):
        codes = codebook.encode_for_scales(flat, scale, lut, 64)
        value = lut[codes.long()] * scale.repeat_interleave(64)[: flat.numel()]
        return torch.nn.functional.pad((value - flat).square(), (0, -flat.numel() % 64)).view(-1, 64).sum(1)

    assert (error(found) <= error(plain) * (1 + 1e-5)).all()  # float32 sums in another order
    assert (error(found) < 0.99 * error(plain)).float().mean() > 0.5


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("extreme", [1e30, 3e38, 1e-40, 1e-30, 0.0])
def test_extreme_weights_stay_finite(extreme, nested, search):
    for fill in (0.0, 1.0):
        weight = weights((20, 70)) * fill
        weight[3, 5] = extreme
        weight[7] = extreme
        config = NF4Config(double_quant=nested, scale_search=search)
        packed = FMT.quantize(weight, config, None)
        back = FMT.from_checkpoint(FMT.to_checkpoint(packed, config), config, (20, 70))
        assert torch.isfinite(dequantize(back)).all()
        if not nested and extreme >= 1e-30:
            assert dequantize(back)[3, 5] == pytest.approx(extreme, rel=0.2)
    take_notes()


def test_distorted_scales_are_reported():
    weight = weights((64, 64))
    weight[0, 0] = 1e6
    take_notes()
    FMT.quantize(weight, NF4Config(), None)
    assert any("double quantization distorts" in n for n in take_notes())
    FMT.quantize(weights((64, 64)).clamp(-1, 1), NF4Config(double_quant=False), None)
    assert take_notes() == []
    with pytest.raises(NumericsError):
        FMT.quantize(torch.full((4, 64), float("nan")), NF4Config(), None)


def edit_state(tensors, **changes):
    state = json.loads(bytes(tensors[STATE + "nf4"].tolist())) | changes
    tensors[STATE + "nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("weight.nested_absmax"), "nested_absmax is missing"),
        (lambda t: t.pop(STATE + "nf4"), "exactly one"),
        (lambda t: t.update({STATE + "fp4": t[STATE + "nf4"]}), "exactly one"),
        (lambda t: t.update(weight=t["weight"][:-1]), "weight has shape"),
        (lambda t: t.update(weight=t["weight"].int()), "dtype int32"),
        (lambda t: t["weight.nested_absmax"].fill_(float("inf")), "NaN or Inf"),
        (lambda t: t["weight.nested_quant_map"].fill_(float("nan")), "NaN or Inf"),
        (lambda t: t["weight.quant_map"].mul_(2), "not the nf4 table"),
        (lambda t: t.update({"weight.absmax": t["weight.absmax"].float()}), "dtype float32"),
        (lambda t: edit_state(t, blocksize=48), "blocksize is 48"),
        (lambda t: edit_state(t, blocksize=True), "blocksize is True"),
        (lambda t: edit_state(t, blocksize=64), "absmax has shape"),
        (lambda t: edit_state(t, shape=[40, 12]), "shape is"),
        (lambda t: edit_state(t, dtype="__import__"), "dtype is"),
        (lambda t: edit_state(t, quant_type="fp4"), "quant_type is 'fp4'"),
        (lambda t: edit_state(t, nested_offset=float("nan")), "nested_offset is nan"),
        (lambda t: edit_state(t, nested_offset=10**400), "nested_offset"),
        (lambda t: edit_state(t, nested_blocksize=0), "nested_blocksize is 0"),
        (lambda t: edit_state(t, filler="x" * 5000), "bytes"),
        (
            lambda t: t.update({STATE + "nf4": torch.tensor(list(b"os.exit()"), dtype=torch.uint8)}),
            "not JSON",
        ),
        (lambda t: t.update({STATE + "nf4": torch.tensor(list(b"[" * 4000), dtype=torch.uint8)}), "not JSON"),
        (lambda t: t.update({STATE + "nf4": torch.tensor([255, 254], dtype=torch.uint8)}), "not JSON"),
        (
            lambda t: t.update({STATE + "nf4": torch.tensor(list(b"[1]"), dtype=torch.uint8)}),
            "not a JSON object",
        ),
    ],
)
def test_hostile_tensors_are_refused(change, says):
    tensors, config = checkpoint()
    FMT.from_checkpoint(tensors, config, (12, 40))
    tensors = {k: v.clone() for k, v in tensors.items()}
    change(tensors)
    with pytest.raises(CheckpointError, match=says):
        FMT.from_checkpoint(tensors, config, (12, 40))


def test_plain_absmax_must_be_finite():
    tensors, config = checkpoint(double_quant=False)
    tensors["weight.absmax"][0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        FMT.from_checkpoint(tensors, config, (12, 40))


def test_other_storage_dtypes_are_read():
    tensors, config = checkpoint()
    expected = dequantize(FMT.from_checkpoint(tensors, config, (12, 40)))
    for dtype in (torch.bfloat16, torch.float32):
        viewed = tensors | {"weight": tensors["weight"].view(-1).view(dtype).view(-1, 1)}
        assert torch.equal(dequantize(FMT.from_checkpoint(viewed, config, (12, 40))), expected)


def test_hf_config_round_trip_and_skips():
    config = NF4Config(quant_type="fp4", double_quant=False, compute_dtype="float16")
    layers = QuantizedLayers(
        config, {"a.score": config}, {"lm_head": "head", "score": "asked"}, tied_lm_head=False
    )
    written = FMT.to_hf_config(layers)
    assert FMT.from_hf_config(written).config == config
    # "score" would match a.score as a suffix in transformers: it is anchored.
    assert written["llm_int8_skip_modules"] == ["lm_head", "^score$"]
    tied = QuantizedLayers(config, {"a.b": config}, {}, tied_lm_head=True)
    assert FMT.to_hf_config(tied)["llm_int8_skip_modules"] == ["lm_head"]


def test_owner_agrees_with_the_skip_list():
    rule = pytest.importorskip("transformers.quantizers.quantizers_utils").should_convert_module
    config = NF4Config()
    layers = QuantizedLayers(
        config, {"a.score": config, "x.fc10": config}, {"score": "", "lm_head": "", "x.fc1": ""}
    )
    skip = FMT.to_hf_config(layers)["llm_int8_skip_modules"]
    assert all(rule(name, skip) for name in layers.quantized)
    assert not any(rule(name, skip) for name in layers.skipped)


@pytest.mark.parametrize(
    ("mapping", "key"),
    [
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({}, "load_in_4bit"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": "yes"}, "bnb_4bit_use_double_quant"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "float64"}, "bnb_4bit_compute_dtype"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": 7}, "bnb_4bit_quant_storage"),
    ],
)
def test_hf_config_refusals_name_the_key(mapping, key):
    with pytest.raises(ConfigError, match=key):
        FMT.from_hf_config(mapping)


def test_hf_config_accepts_owner_spellings():
    mapping = {"_load_in_4bit": True, "bnb_4bit_compute_dtype": "torch.bfloat16", "something_new": {"a": 1}}
    read = FMT.from_hf_config(mapping | {"bnb_4bit_quant_storage": None}).config
    assert (read.quant_type, read.double_quant, read.compute_dtype) == ("fp4", False, "bfloat16")
