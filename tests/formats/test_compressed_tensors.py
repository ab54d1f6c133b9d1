"""compressed-tensors: files that the library itself packs, config groups, hostile tensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit.encoding import Float8, dequantize
from quantkit.errors import CheckpointError, ConfigError
from quantkit.formats.base import QuantizedLayers
from quantkit.formats.compressed_tensors import CompressedTensors, CTScheme
from quantkit.formats.fp8 import FP8, FP8Config

LAYOUT = CompressedTensors()
GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
FLOAT8 = {"num_bits": 8, "type": "float"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def weights(shape, dtype="float32", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(getattr(torch, dtype))


def scheme(weight_args, **group):
    mapping = {
        "format": "pack-quantized" if weight_args["type"] == "int" else "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weight_args, **group}},
    }
    return LAYOUT.from_hf_config(mapping).config_for("model.layers.0.mlp.up_proj")


def pack(codes, bits):
    """Independent of bitpack: codes [R, C] as one bit stream per row, as numpy-free big integers."""
    words = -(-codes.shape[1] * bits // 32)
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        parts = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(words)]
        rows.append([p - (1 << 32) if p >= 1 << 31 else p for p in parts])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files")
def test_golden_fp8_dynamic_reads_close_to_its_source():
    import json

    folder = GOLDEN / "ct_llama_FP8_DYNAMIC"
    mapping = json.loads((folder / "config.json").read_text())["quantization_config"]
    golden, source = (
        load_file(folder / "model.safetensors"),
        load_file(GOLDEN / "sources/llama/model.safetensors"),
    )
    config = LAYOUT.from_hf_config(mapping)
    names = [n.removesuffix(".weight_scale") for n in golden if n.endswith(".weight_scale")]
    for name in names:
        tensors = {s: golden[f"{name}.{s}"] for s in ("weight", "weight_scale")}
        dense = source[name + ".weight"].float()
        read = LAYOUT.from_checkpoint(tensors, config.config_for(name), tuple(dense.shape))
        assert read.activation == "fp8_token"
        # Half a step of e4m3 relative to the value, or of its subnormals.
        bound = dense.abs() * (2**-4 + 2**-7) + read.scale * 2**-10 * 1.01
        assert ((dequantize(read) - dense).abs() <= bound).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(24, 96), (13, 100), (1, 7)])
def test_packed_integers_against_a_bit_stream(shape, bits, symmetric):
    n, k = shape
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator)
    zero = torch.randint(0, 1 << bits, (n, 1), generator=generator)
    scale = torch.rand(n, 1, generator=generator) + 0.1
    args = {"num_bits": bits, "type": "int", "strategy": "channel", "symmetric": symmetric}
    tensors = {
        "weight_packed": pack(codes, bits),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack(zero.T, bits).T.contiguous()
    read = LAYOUT.from_checkpoint(tensors, scheme(args), shape)
    offset = zero.double() if not symmetric else 2.0 ** (bits - 1)
    value = (codes.double() - offset) * scale.bfloat16().double()
    torch.testing.assert_close(dequantize(read, torch.float64), value, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("bits", [4, 8])
def test_owner_packs_and_we_read(bits, strategy, symmetric):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import PackedQuantizationCompressor as Packer
    from compressed_tensors.quantization.utils import calculate_qparams

    n, k = 40, 96
    args = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    args |= {"group_size": 32} if strategy == "group" else {}
    owner = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**args))
    weight = weights((n, k))
    groups = weight.unflatten(1, (-1, 32 if strategy == "group" else k))
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), owner.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    packed = Packer.compress(state, owner)
    dense = Packer.decompress(packed, owner)["weight"]
    read = LAYOUT.from_checkpoint(packed, scheme(args), (n, k))
    assert torch.equal(dequantize(read), dense)
    assert (dequantize(read) - weight).abs().max() <= scale.max() * 1.01  # it is the weight we packed


@pytest.mark.parametrize("options", [
    {"scheme": "tensor"}, {"scheme": "channel"}, {"scheme": "block"}, {"scheme": "channel", "activation": "none"},
])  # fmt: skip
@pytest.mark.parametrize("shape", [(200, 256), (63, 100)])
def test_owner_reads_what_we_write(options, shape):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import FloatQuantizationCompressor as Reader

    config = FP8Config(
        layout="compressed-tensors", partial_blocks="write", compute_dtype="bfloat16", **options
    )
    weight = weights(shape, "bfloat16")
    packed = FP8().quantize(weight.float(), config, None)
    tensors = FP8().to_checkpoint(packed, config)
    written = FP8().to_hf_config(QuantizedLayers(config, {"a.b": config}, {"lm_head": ""}))
    owner = quantization.QuantizationConfig.model_validate(written)
    assert owner.ignore == ["lm_head"]
    theirs = Reader.decompress(dict(tensors), owner.config_groups["group_0"])["weight"]
    # The owner multiplies in bfloat16: one rounding of 2**-9 on top of ours.
    torch.testing.assert_close(theirs.float(), dequantize(packed), rtol=2**-8, atol=0)
    mine = LAYOUT.from_checkpoint(tensors, LAYOUT.from_hf_config(written).config_for("a.b"), shape)
    assert torch.equal(dequantize(mine), dequantize(packed))


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fp8_bit_identical_to_the_owner(dtype, strategy):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import FloatQuantizationCompressor as Writer
    from compressed_tensors.quantization.utils import calculate_qparams

    shape = (63, 1000) if strategy != "block" else (200, 300)
    weight = weights(shape, dtype, seed=3)
    weight[3] = 0
    weight[5, 7] = -0.0
    weight[6] *= 1e-4
    args = {**FLOAT8, "strategy": strategy} | ({"block_structure": [128, 128]} if strategy == "block" else {})
    owner = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**args))
    if strategy == "block":
        tiles = torch.nn.functional.pad(weight, (0, 84, 0, 56)).view(2, 128, 3, 128).abs().amax((1, 3))
        scale, zero = calculate_qparams(-tiles, tiles, owner.weights)
    elif strategy == "channel":
        scale, zero = calculate_qparams(weight.amin(1, True), weight.amax(1, True), owner.weights)
    else:
        scale, zero = calculate_qparams(weight.amin(), weight.amax(), owner.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    theirs = Writer.compress(state, owner)
    config = FP8Config(
        scheme=strategy, layout="compressed-tensors", compute_dtype=dtype, partial_blocks="write"
    )
    mine = FP8().to_checkpoint(FP8().quantize(weight.float(), config, None), config)
    assert set(mine) == set(theirs)
    assert mine["weight_scale"].dtype == theirs["weight_scale"].dtype == getattr(torch, dtype)
    assert torch.equal(mine["weight_scale"], theirs["weight_scale"])
    assert torch.equal(mine["weight"].view(torch.uint8), theirs["weight"].view(torch.uint8))


def test_activation_order():
    """weight_g_idx: column k uses the scale of group g_idx[k]."""
    n, k = 12, 64
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (n, k), generator=generator)
    scale = torch.rand(n, 2, generator=generator) + 0.5
    g_idx = (torch.randperm(k, generator=generator) // 32).int()
    tensors = {
        "weight_packed": pack(codes, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor([n, k]),
        "weight_g_idx": g_idx,
    }
    read = LAYOUT.from_checkpoint(tensors, scheme(INT4), (n, k))
    assert read.perm is not None
    value = (codes.double() - 8) * scale.double()[:, g_idx.long()]
    torch.testing.assert_close(dequantize(read, torch.float64), value, rtol=0, atol=0)
    tensors["weight_g_idx"] = torch.full((k,), -1, dtype=torch.int32)  # "unset" in older files
    assert LAYOUT.from_checkpoint(tensors, scheme(INT4), (n, k)).perm is None
    for bad, says in ((g_idx + 1, "outside"), (torch.zeros(k, dtype=torch.int32), "32 columns")):
        tensors["weight_g_idx"] = bad.int()
        with pytest.raises(CheckpointError, match=says):
            LAYOUT.from_checkpoint(tensors, scheme(INT4), (n, k))


def test_targets_resolve_like_the_owner():
    match = pytest.importorskip("compressed_tensors.utils.match")
    groups = {
        "class": {"targets": ["Linear"], "weights": {**FLOAT8, "strategy": "channel"}},
        "regex": {"targets": ["re:.*down_proj", "re:model[.]layers[.]1[.].*"], "weights": INT4},
        "name": {"targets": ["model.layers.1.up_proj"], "weights": {**FLOAT8, "strategy": "tensor"}},
    }
    for i, group in enumerate(groups.values()):
        group["weights"] = dict(group["weights"])
        group["format"] = "pack-quantized" if i == 1 else "float-quantized"
    read = LAYOUT.from_hf_config({"format": "mixed-precision", "config_groups": groups})
    by_target = {t: g for g in groups.values() for t in g["targets"]}
    for name in ("model.layers.0.up_proj", "model.layers.0.down_proj", "model.layers.1.up_proj", "xdown_projx",
                 "model.layers.1.q", "model.layers.10.q"):  # fmt: skip
        theirs = by_target[match.match_targets(name, torch.nn.Linear(1, 1), by_target)[0]]["weights"]
        mine = read.config_for(name)
        assert (mine.kind, mine.bits, mine.strategy) == (
            theirs["type"],
            theirs["num_bits"],
            theirs["strategy"],
        )


def test_modules_without_a_group_are_refused():
    groups = {"g": {"targets": ["model.a"], "weights": {**FLOAT8, "strategy": "tensor"}}}
    read = LAYOUT.from_hf_config({"format": "float-quantized", "config_groups": groups})
    assert isinstance(read.config_for("model.a"), CTScheme) and read.config_for("modelxa") is None
    with pytest.raises(CheckpointError, match="no config_groups target"):
        LAYOUT.from_checkpoint({}, read.config_for("model.b"), (4, 4))


def test_presets_and_defaults():
    read = LAYOUT.from_hf_config({"format": "pack-quantized", "config_groups": {"W4A16": ["Linear"]}}).config
    assert (read.bits, read.group_size, read.symmetric, read.activation) == (4, 128, True, None)
    read = LAYOUT.from_hf_config(
        {"format": "float-quantized", "config_groups": {"FP8_BLOCK": ["Linear"]}}
    ).config
    assert (read.block, read.activation) == ((128, 128), "fp8_group128")


def test_several_fp8_schemes_in_one_checkpoint():
    default = FP8Config(scheme="channel", layout="compressed-tensors")
    other = FP8Config(scheme="tensor", layout="compressed-tensors", activation="none", scale_search=True)
    layers = QuantizedLayers(default, {"a": default, "b": other, "c": other}, {}, tied_lm_head=True)
    written = FP8().to_hf_config(layers)
    assert written["ignore"] == ["lm_head"] and written["format"] == "mixed-precision"
    read = LAYOUT.from_hf_config(written)
    assert [read.config_for(n).strategy for n in "abc"] == ["channel", "tensor", "tensor"]
    assert [read.config_for(n).activation for n in "abc"] == ["fp8_token", None, None]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("weight_shape"), "weight_shape is missing"),
        (lambda t: t["weight_shape"].add_(1), "weight_shape is"),
        (lambda t: t.update(weight_packed=t["weight_packed"][:, :-1]), "weight_packed has shape"),
        (lambda t: t.update(weight_packed=t["weight_packed"].long()), "weight_packed has dtype"),
        (lambda t: t["weight_scale"].fill_(float("nan")), "NaN or Inf"),
        (lambda t: t.update(weight_scale=t["weight_scale"].T), "weight_scale has shape"),
        (lambda t: t.update(weight_scale=t["weight_scale"].int()), "weight_scale has dtype"),
        (lambda t: t.pop("weight_zero_point"), "weight_zero_point is missing"),
    ],
)
def test_hostile_packed_tensors_are_refused(change, says):
    tensors = {
        "weight_packed": pack(torch.zeros(16, 64, dtype=torch.int64), 4),
        "weight_scale": torch.ones(16, 2),
        "weight_shape": torch.tensor([16, 64]),
        "weight_zero_point": pack(torch.zeros(2, 16, dtype=torch.int64), 4).T.contiguous(),
    }
    config = scheme({**INT4, "symmetric": False})
    LAYOUT.from_checkpoint(tensors, config, (16, 64))
    change(tensors)
    with pytest.raises(CheckpointError, match=says):
        LAYOUT.from_checkpoint(tensors, config, (16, 64))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update(weight_scale=torch.ones(5)), "weight_scale has shape"),
        (lambda t: t["weight"].view(torch.uint8)[0].fill_(0x7F), "weight holds NaN"),
        (lambda t: t.update(weight_zero_point=torch.ones(1)), "weight_zero_point"),
        (lambda t: t.update(input_scale=torch.tensor([-1.0])), "input_scale"),
        (lambda t: t.pop("input_scale"), "input_scale is missing"),
    ],
)
def test_hostile_fp8_tensors_are_refused(change, says):
    codes = torch.zeros(8, 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": torch.ones(1), "input_scale": torch.ones(1)}
    inputs = {**FLOAT8, "strategy": "tensor", "dynamic": False}
    config = scheme({**FLOAT8, "strategy": "tensor"}, input_activations=inputs)
    read = LAYOUT.from_checkpoint(tensors, config, (8, 16))
    assert read.encoding == Float8((8, 16)) and read.activation == "fp8_static"
    change(tensors)
    with pytest.raises(CheckpointError, match=says):
        LAYOUT.from_checkpoint(tensors, config, (8, 16))


@pytest.mark.parametrize(
    ("mapping", "key"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"NVFP4": ["Linear"]}}, "config_groups.NVFP4"),
        ({"config_groups": {"g": {"targets": "Linear", "weights": INT4}}}, "config_groups.g.targets"),
        ({"config_groups": {"g": {"targets": ["re:(("], "weights": INT4}}}, "config_groups.g.targets"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": {**INT4, "num_bits": 5}}}}, "num_bits"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {**INT4, "group_size": 0}}}},
            "group_size",
        ),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {**INT4, "strategy": "token"}}}},
            "strategy",
        ),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": {**INT4, "symmetric": 1}}}}, "symmetric"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {**FLOAT8, "strategy": "block"}}}},
            "block_structure",
        ),
        (
            {"config_groups": {"g": {"targets": [], "weights": INT4, "input_activations": {"num_bits": 8}}}},
            "input_activations",
        ),
        ({"config_groups": {"g": {"targets": [], "weights": INT4, "format": "float-quantized"}}}, "g.format"),
    ],
)
def test_config_refusals_name_the_key(mapping, key):
    base = {"config_groups": {"g": {"targets": ["Linear"], "weights": INT4}}}
    LAYOUT.from_hf_config(base)
    with pytest.raises(ConfigError, match=key.replace(".", "[.]")):
        LAYOUT.from_hf_config(base | mapping)
