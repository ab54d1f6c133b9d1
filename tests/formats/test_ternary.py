"""BitNet files: both meanings of weight_scale against transformers' own modules, fits, refusals."""

import itertools

import pytest
import torch

from quantkit.algorithms import ternary
from quantkit.encoding import dequantize
from quantkit.errors import CheckpointError, ConfigError, NumericsError
from quantkit.formats.base import LayerStats, Needs, QuantizedLayers, take_notes
from quantkit.formats.ternary import Ternary, TernaryConfig

FMT = Ternary()
CLASSES = ["autobitlinear", "bitlinear"]


def weights(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator) * 0.1


def statistics(columns, tokens=512, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.4 * torch.randn(columns, columns, generator=generator) / columns**0.5
    loudness = torch.rand(columns, generator=generator) * 3 + 0.05
    x = torch.randn(tokens, columns, generator=generator) @ mix * loudness
    return LayerStats(tokens, x.T @ x)


def output_error(weight, packed, stats):
    error = weight.double() - dequantize(packed, torch.float64)
    return float((error @ stats.hessian.double() * error).sum())


@pytest.fixture
def owner():
    module = pytest.importorskip("transformers.integrations.bitnet")
    with torch.compiler.set_stance("force_eager"):  # the owner's helpers are torch.compile'd
        yield module


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("linear_class", CLASSES)
@pytest.mark.parametrize("shape", [(64, 100), (12, 7), (4, 1), (8, 63)])
def test_round_trip_in_float64(shape, linear_class, dtype):
    config = TernaryConfig(fit="weight", linear_class=linear_class, compute_dtype=dtype)
    packed = FMT.quantize(weights(shape), config, None)
    tensors = FMT.to_checkpoint(packed, config)
    spec = FMT.checkpoint_spec(shape, config)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == {
        k: (s.dtype, s.shape) for k, s in spec.items()
    }
    read = FMT.from_checkpoint(tensors, config, shape)
    assert read.activation == "int8_token"
    n = shape[0]
    stored = float(tensors["weight_scale"])
    multiplier = stored if linear_class == "autobitlinear" else 1.0 / stored
    for row in range(n):
        quarter, offset = divmod(row, n // 4)
        value = ((tensors["weight"][offset].int() // 4**quarter) % 4 - 1).double() * multiplier
        # The multiplier 1/stored is rounded to float32 in memory.
        torch.testing.assert_close(dequantize(read, torch.float64)[row], value, rtol=2**-23, atol=0)
    assert torch.equal(dequantize(read), dequantize(packed))
    take_notes()


@pytest.mark.parametrize("shape", [(64, 96), (12, 7)])
def test_owner_packs_the_same_bytes(owner, shape):
    config = TernaryConfig(fit="absmean", compute_dtype="float32")
    weight = weights(shape)
    tensors = FMT.to_checkpoint(FMT.quantize(weight, config, None), config)
    scale = 1.0 / weight.abs().mean().clamp(min=1e-5)
    values = (weight * scale).round().clamp(-1, 1)
    assert torch.equal(tensors["weight"], owner.pack_weights(values.clone()))
    assert torch.equal(owner.unpack_weights(tensors["weight"], torch.float32), values)
    assert torch.equal(tensors["weight_scale"], weight.abs().mean().view(1))
    # and the dense weight is what the owner's online mode computes
    online = owner.WeightQuant.apply(weight)
    read = FMT.from_checkpoint(tensors, config, shape)
    torch.testing.assert_close(dequantize(read), online, rtol=2**-22, atol=0)  # 1/(1/x) in float32
    take_notes()


@pytest.mark.parametrize("linear_class", CLASSES)
def test_owner_computes_the_same_layer(owner, linear_class):
    """weight_scale multiplies in one class and divides in the other."""
    config = TernaryConfig(fit="weight", linear_class=linear_class, compute_dtype="float32")
    packed = FMT.quantize(weights((32, 48)), config, None)
    tensors = FMT.to_checkpoint(packed, config)
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
    if linear_class == "bitlinear":
        layer = owner.BitLinear(48, 32, bias=False, dtype=torch.float32)
        layer.weight.copy_(tensors["weight"])
    else:
        layer = owner.AutoBitLinear(48, 32, bias=False, dtype=torch.float32)
        layer.weight.data = owner.unpack_weights(tensors["weight"], torch.float32)
    layer.weight_scale.copy_(tensors["weight_scale"])
    rounded = (x * (127 / x.abs().amax(-1, True))).round() / (127 / x.abs().amax(-1, True))
    expected = rounded.double() @ dequantize(packed, torch.float64).T
    # float32 sums of 48 products, and one more division.
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)
    take_notes()


def test_weight_fit_is_the_global_optimum():
    """Against a brute-force scan of every threshold, in float64."""
    for seed in range(5):
        weight = weights((8, 31), seed)
        result = ternary.fit_weight(weight)
        magnitude = weight.double().abs().flatten().sort(descending=True).values
        best = min(
            float(magnitude.square().sum() - magnitude[:m].sum() ** 2 / m)
            for m in range(1, len(magnitude) + 1)
        )
        error = (weight.double() - (result.codes.double() - 1) * result.scale).square().sum()
        assert float(error) == pytest.approx(best, rel=1e-5)
        assert result.gain < 1.0


def test_sampled_weight_fit_agrees_with_the_sorted_one(monkeypatch):
    weight = weights((400, 500), 2)
    exact = ternary.fit_weight(weight)
    monkeypatch.setattr(ternary, "_SORT_LIMIT", 40_000)
    sampled = ternary.fit_weight(weight)
    assert sampled.scale == pytest.approx(exact.scale, rel=1e-3)


@pytest.mark.parametrize("fit", ["weight", "hessian"])
def test_ternary_weights_are_recovered_exactly(fit):
    codes = torch.randint(0, 3, (16, 40), generator=torch.Generator().manual_seed(5))
    weight = (codes.float() - 1) * 0.0625
    config = TernaryConfig(fit=fit, compute_dtype="bfloat16")
    packed = FMT.quantize(weight, config, statistics(40))
    assert torch.equal(dequantize(packed), weight)
    take_notes()


def test_hessian_fit_beats_the_weight_fit_and_the_rule():
    weight, stats = weights((64, 96)), statistics(96)
    errors = {}
    for fit in ("absmean", "weight", "hessian"):
        packed = FMT.quantize(weight, TernaryConfig(fit=fit, compute_dtype="float32"), stats)
        errors[fit] = output_error(weight, packed, stats)
    assert errors["weight"] < errors["absmean"]
    assert errors["hessian"] < 0.95 * errors["weight"]
    assert "of the absmean rule's" in " ".join(take_notes())


def test_more_sweeps_never_raise_the_error():
    weight, stats = weights((32, 64), 7), statistics(64)
    found = [ternary.fit_hessian(weight, stats.hessian, stats.tokens, sweeps).gain for sweeps in (1, 2, 4, 8)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(
    "stats",
    [None, LayerStats(0, torch.zeros(40, 40)), LayerStats(5, torch.full((40, 40), float("nan")))],
)
def test_without_usable_statistics_the_weight_is_fitted(stats):
    weight = weights((8, 40))
    take_notes()
    packed = FMT.quantize(weight, TernaryConfig(compute_dtype="float32"), stats)
    assert any("weight alone" in n for n in take_notes())
    assert torch.equal(packed.codes, FMT.quantize(weight, TernaryConfig(fit="weight"), None).codes)
    take_notes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("linear_class", CLASSES)
@pytest.mark.parametrize("fit", ["absmean", "weight", "hessian"])
def test_extreme_weights_stay_finite(fit, linear_class, dtype):
    config = TernaryConfig(fit=fit, linear_class=linear_class, compute_dtype=dtype)
    for extreme in (0.0, 1e-40, 1e-20, 1e30, 3e38):
        for fill in (0.0, 1.0):
            weight = weights((8, 24)) * fill
            weight[3, 5] = extreme
            weight[1] += extreme / 3
            read = FMT.from_checkpoint(
                FMT.to_checkpoint(FMT.quantize(weight, config, statistics(24)), config), config, (8, 24)
            )
            assert torch.isfinite(dequantize(read)).all()
    take_notes()
    with pytest.raises(NumericsError):
        FMT.quantize(torch.full((4, 4), float("inf")), config, None)


def test_input_is_not_modified_and_scale_survives_storage():
    weight = weights((16, 32))
    copy = weight.clone()
    for linear_class in CLASSES:
        config = TernaryConfig(fit="hessian", linear_class=linear_class, compute_dtype="bfloat16")
        packed = FMT.quantize(weight, config, statistics(32))
        again = FMT.from_checkpoint(FMT.to_checkpoint(packed, config), config, (16, 32))
        assert torch.equal(again.scale, packed.scale)
    assert torch.equal(weight, copy)
    take_notes()


def test_fit_and_needs():
    assert FMT.fit((10, 8), TernaryConfig()).config is None
    assert "multiple of 4" in FMT.fit((10, 8), TernaryConfig()).note
    assert FMT.fit((12, 7), TernaryConfig()).config is not None
    assert FMT.needs(TernaryConfig()) is Needs.HESSIAN
    assert FMT.needs(TernaryConfig(fit="weight")) is Needs.NONE
    assert FMT.check_overrides(TernaryConfig(), TernaryConfig(fit="absmean")) == ""
    assert "linear_class" in FMT.check_overrides(TernaryConfig(), TernaryConfig(linear_class="bitlinear"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("weight_scale"), "weight_scale is missing"),
        (lambda t: t["weight"][0].fill_(0b11000000), "code 3"),
        (lambda t: t.update(weight=t["weight"].to(torch.int8)), "weight has dtype int8"),
        (lambda t: t.update(weight=t["weight"][:-1]), "weight has shape"),
        (lambda t: t["weight_scale"].zero_(), "not above zero"),
        (lambda t: t["weight_scale"].fill_(float("nan")), "NaN or Inf"),
        (lambda t: t["weight_scale"].fill_(1e-41), "no finite reciprocal"),
        (lambda t: t.update(weight_scale=torch.ones(2)), "weight_scale has shape"),
        (lambda t: t.update(weight_scale=torch.ones(1, dtype=torch.int32)), "weight_scale has dtype"),
    ],
)
def test_hostile_tensors_are_refused(change, says):
    config = TernaryConfig(fit="weight", linear_class="bitlinear", compute_dtype="float32")
    tensors = FMT.to_checkpoint(FMT.quantize(weights((16, 8)), config, None), config)
    FMT.from_checkpoint(tensors, config, (16, 8))
    change(tensors)
    with pytest.raises(CheckpointError, match=says):
        FMT.from_checkpoint(tensors, config, (16, 8))
    take_notes()


def test_a_weight_that_is_not_ternary_cannot_be_written():
    from dataclasses import replace

    config = TernaryConfig(fit="weight")
    packed = FMT.quantize(weights((8, 8)), config, None)
    for bad in (
        replace(packed, codes=torch.full_like(packed.codes, 255)),
        replace(packed, scale=torch.rand(8, 1)),
        replace(packed, zero=torch.zeros(8, 1, dtype=torch.uint8)),
    ):
        with pytest.raises(ValueError):
            FMT.to_checkpoint(bad, config)
    take_notes()


@pytest.mark.parametrize(
    ("mapping", "key"),
    [
        ({"linear_class": "linear"}, "linear_class"),
        ({"quantization_mode": "online"}, "quantization_mode"),
        ({"use_rms_norm": True}, "use_rms_norm"),
    ],
)
def test_hf_config_refusals_name_the_key(mapping, key):
    with pytest.raises(ConfigError, match=key):
        FMT.from_hf_config(mapping)


def test_hf_config_round_trip():
    for linear_class in CLASSES:
        config = TernaryConfig(linear_class=linear_class)
        written = FMT.to_hf_config(QuantizedLayers(config, {"a": config}, {"lm_head": ""}))
        assert written["modules_to_not_convert"] == ["lm_head"]
        assert FMT.from_hf_config(written).config.linear_class == linear_class
    # Files from before linear_class existed, and a current one.
    assert FMT.from_hf_config({"modules_to_not_convert": ["lm_head"]}).config.linear_class == "bitlinear"
    published = {"linear_class": "autobitlinear", "quantization_mode": "offline", "quant_method": "bitnet"}
    assert FMT.from_hf_config(published).config.linear_class == "autobitlinear"
