"""AWQ's gemm layout: an independent unpacking in numpy, AutoAWQ's file, round trips, hostile tensors."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from quantkit.encoding import dequantize, pack_affine
from quantkit.errors import CheckpointError, ConfigError
from quantkit.formats.awq import AWQ, AWQConfig, not_converted, pack_words, unpack_words
from quantkit.formats.base import LayerStats, Needs, QuantizedLayers, take_notes

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT.parent / "shared" / "golden" / "awq_llama_gemm_g128"
GOLDEN_IDS = [5, 17, 300, 42, 99, 256, 400, 7]  # the input that np_logits.npy was computed for
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="shared/golden is not here")

awq = AWQ()


def numpy_dense(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """The layout's definition, one nibble at a time, sharing nothing with quantkit: `[N, K]`."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def unpack(words: np.ndarray) -> np.ndarray:
        out = np.zeros((words.shape[0], words.shape[1] * 8), dtype=np.int64)
        for i, column in enumerate(order):
            out[:, column::8] = (words.astype(np.int64) >> (4 * i)) & 15
        return out

    codes, zeros = unpack(qweight), unpack(qzeros)
    rows = np.arange(codes.shape[0]) // group
    return ((codes - zeros[rows]) * scales.astype(np.float32)[rows]).T.astype(np.float32)


def random_packed(n: int = 16, k: int = 64, group: int = 32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
    zero = torch.randint(0, 16, (n, k // group), generator=g, dtype=torch.uint8)
    scale = torch.rand(n, k // group, generator=g).half() + 0.01
    return pack_affine(codes, scale, zero, 4, group)


def test_pack_words_follows_the_order_of_autoawq() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[None]
    word = int(pack_words(codes)[0, 0]) & 0xFFFFFFFF
    assert [(word >> (4 * i)) & 15 for i in range(8)] == [0, 2, 4, 6, 1, 3, 5, 7]
    every = torch.randint(0, 16, (5, 24), dtype=torch.uint8)
    assert torch.equal(unpack_words(pack_words(every)), every)


@pytest.mark.parametrize("group", [32, 64, -1])
def test_round_trip_and_numpy_agree(group: int) -> None:
    config = AWQConfig(group_size=group)
    size = 64 if group == -1 else group
    packed = random_packed(group=size)
    tensors = awq.to_checkpoint(packed, config)
    spec = awq.checkpoint_spec((16, 64), config)
    found = {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}
    assert found == {k: (s.dtype, s.shape) for k, s in spec.items()}
    back = awq.from_checkpoint(tensors, config, (16, 64))
    for name, tensor in packed.tensors().items():
        assert torch.equal(getattr(back, name), tensor), name
    again = awq.to_checkpoint(back, config)
    assert all(torch.equal(again[k], v) for k, v in tensors.items())
    expected = numpy_dense(*(tensors[k].numpy() for k in ("qweight", "qzeros", "scales")), size)
    assert np.array_equal(dequantize(back).numpy(), expected)


def golden_tensors() -> tuple[dict[str, Tensor], dict]:
    from safetensors.torch import load_file

    config = json.loads((GOLDEN / "config.json").read_text())
    return load_file(str(GOLDEN / "model.safetensors")), config


@needs_golden
def test_golden_file_of_autoawq() -> None:
    tensors, config = golden_tensors()
    read = awq.from_hf_config(config["quantization_config"]).config
    assert read.group_size == 128 and read.zero_point
    names = sorted(k.removesuffix(".qweight") for k in tensors if k.endswith(".qweight"))
    assert len(names) == 28
    for name in names:
        mine = {s: tensors[f"{name}.{s}"] for s in awq.suffixes}
        k, n = mine["qweight"].shape[0], mine["qweight"].shape[1] * 8
        packed = awq.from_checkpoint(mine, read, (n, k))
        expected = numpy_dense(*(mine[s].numpy() for s in ("qweight", "qzeros", "scales")), 128)
        assert np.array_equal(dequantize(packed).numpy(), expected), name
        written = awq.to_checkpoint(packed, read)
        assert all(torch.equal(written[s], mine[s]) for s in awq.suffixes), name


@needs_golden
def test_golden_logits() -> None:
    transformers = pytest.importorskip("transformers")
    tensors, config = golden_tensors()
    read = awq.from_hf_config(config.pop("quantization_config")).config
    config.pop("rope_scaling")
    hf = transformers.LlamaConfig(**config)
    model = transformers.LlamaForCausalLM._from_config(hf, dtype=torch.float32).eval()
    state = {}
    for key, value in tensors.items():
        name, _, leaf = key.rpartition(".")
        if leaf == "qweight":
            shape = tuple(model.get_submodule(name).weight.shape)
            mine = {s: tensors[f"{name}.{s}"] for s in awq.suffixes}
            state[name + ".weight"] = dequantize(awq.from_checkpoint(mine, read, shape))
        elif leaf == "weight":
            state[key] = value
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(torch.tensor([GOLDEN_IDS])).logits
    expected = torch.from_numpy(np.load(GOLDEN / "np_logits.npy"))
    assert float((logits - expected).norm() / expected.norm()) < 5e-6


def hostile(**changes: Tensor | None) -> dict[str, Tensor]:
    tensors = dict(awq.to_checkpoint(random_packed(), AWQConfig(group_size=32)))
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    return tensors


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"qweight": None}, "qweight is missing"),
        ({"qzeros": None}, "qzeros is missing"),
        ({"scales": None}, "scales is missing"),
        ({"qweight": torch.zeros(64, 2, dtype=torch.int64)}, "qweight has dtype"),
        ({"qweight": torch.zeros(64, 2)}, "qweight has dtype"),
        ({"qweight": torch.zeros(8, 16, dtype=torch.int32)}, "qweight has shape"),
        ({"qweight": torch.zeros(0, 2, dtype=torch.int32)}, "qweight has shape"),
        ({"qzeros": torch.zeros(1, 2, dtype=torch.int32)}, "qzeros has shape"),
        ({"qzeros": torch.zeros(2, 2, dtype=torch.uint8)}, "qzeros has dtype"),
        ({"scales": torch.ones(2, 16, dtype=torch.int32)}, "scales has dtype"),
        ({"scales": torch.ones(16, 2, dtype=torch.float16)}, "scales has shape"),
        ({"scales": torch.full((2, 16), float("nan"), dtype=torch.float16)}, "scales holds NaN"),
        ({"scales": torch.full((2, 16), float("inf"), dtype=torch.float16)}, "scales holds NaN"),
    ],
)
def test_hostile_tensors_are_refused_by_name(changes: dict, word: str) -> None:
    with pytest.raises(CheckpointError, match=word):
        awq.from_checkpoint(hostile(**changes), AWQConfig(group_size=32), (16, 64))


def test_shapes_that_cannot_be() -> None:
    for shape, group in (((12, 64), 32), ((16, 60), 32)):
        with pytest.raises(CheckpointError, match="cannot be stored"):
            awq.from_checkpoint(hostile(), AWQConfig(group_size=group), shape)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"version": "gemv"}, "version 'gemv'"),
        ({"version": "gemv_fast"}, "gemv_fast"),
        ({"version": "marlin"}, "marlin"),
        ({"version": 3}, "version 3"),
        ({"bits": 8}, "bits 8"),
        ({"bits": "4"}, "bits '4'"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": True}, "group_size True"),
        ({"zero_point": "yes"}, "zero_point"),
        ({"desc_act": True}, "desc_act"),
        ({"backend": "llm-awq"}, "llm-awq"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
    ],
)
def test_unsupported_configs_are_refused_by_key(change: dict, word: str) -> None:
    good = {"quant_method": "awq", "version": "GEMM", "bits": 4, "group_size": 128, "zero_point": True}
    assert awq.from_hf_config(good).config == AWQConfig()
    with pytest.raises(ConfigError, match=word):
        awq.from_hf_config({**good, **change})


def test_old_key_names_are_read() -> None:
    read = awq.from_hf_config({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": False})
    assert (read.config.group_size, read.config.zero_point) == (64, False)


def test_fit_states_the_policy() -> None:
    assert awq.fit((64, 256), AWQConfig()).config == AWQConfig()
    assert awq.fit((64, 172), AWQConfig(group_size=-1)).config is not None
    for shape, config, word in (
        ((60, 256), AWQConfig(), "out_features 60"),
        ((64, 172), AWQConfig(), "in_features 172"),
        ((64, 256), AWQConfig(group_size=256), "group_size 256"),
    ):
        fit = awq.fit(shape, config)
        assert fit.config is None and word in fit.note
    with pytest.raises(ValidationError):
        AWQConfig(bits=3)  # type: ignore[arg-type]


def test_overrides_can_only_change_the_search() -> None:
    assert awq.check_overrides(AWQConfig(), AWQConfig(feedback=False, scale_steps=5)) == ""
    assert "group_size" in awq.check_overrides(AWQConfig(), AWQConfig(group_size=64))
    assert awq.needs(AWQConfig()) is Needs.SMOOTHING


def layers(quantized: list[str], skipped: list[str]) -> QuantizedLayers:
    return QuantizedLayers(AWQConfig(), dict.fromkeys(quantized, AWQConfig()), dict.fromkeys(skipped, "why"))


def autoawq_skips(entries: list[str], name: str) -> bool:
    """AutoAWQ 0.2.9: a substring of the name within the decoder layer."""
    within = name.split(".", 3)[3]
    return any(e in within for e in entries)


def vllm_skips(entries: list[str], name: str) -> bool:
    return any(e in name for e in entries)


def transformers_skips(entries: list[str], name: str) -> bool:
    import re

    return any(re.match(rf"(?:{e})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(e) for e in entries)


LINEARS = [
    f"model.layers.{i}.{m}" for i in range(12) for m in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
]


def test_skipped_everywhere_is_understood_by_all_loaders() -> None:
    skipped = [n for n in LINEARS if n.endswith("down_proj")]
    kept = [n for n in LINEARS if n not in skipped]
    entries = not_converted(layers(kept, [*skipped, "lm_head"]))
    assert entries == ["mlp.down_proj"]
    for skips in (autoawq_skips, vllm_skips, transformers_skips):
        assert all(skips(entries, n) for n in skipped)
        assert not any(skips(entries, n) for n in kept)


def test_skipped_in_one_layer_is_named_in_full() -> None:
    skipped = ["model.layers.1.mlp.down_proj"]
    kept = [n for n in LINEARS if n not in skipped]
    entries = not_converted(layers(kept, skipped))
    assert entries == skipped
    for skips in (vllm_skips, transformers_skips):
        assert [n for n in LINEARS if skips(entries, n)] == skipped


def test_a_router_does_not_take_gate_proj_along() -> None:
    """ "mlp.gate" is a substring of "mlp.gate_proj": the full name is written where both exist."""
    kept = ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.experts.0.gate_proj"]
    entries = not_converted(layers(kept, ["model.layers.1.mlp.gate"]))
    assert entries == ["model.layers.1.mlp.gate"]
    assert not any(vllm_skips(entries, n) or transformers_skips(entries, n) for n in kept)
    assert not_converted(layers(kept[1:], ["model.layers.1.mlp.gate"])) == ["mlp.gate"]


def test_hf_config_is_that_of_autoawq() -> None:
    config = awq.to_hf_config(layers(LINEARS, ["lm_head"]))
    assert config == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    assert awq.from_hf_config(config).config == AWQConfig()


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("zero_point", [True, False])
def test_quantize_returns_codes_for_the_stored_scales(feedback: bool, zero_point: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), torch.randn(256, 64)
    stats = LayerStats(256, x.t() @ x, x.abs().sum(0))
    config = AWQConfig(group_size=32, zero_point=zero_point, feedback=feedback)
    before = weight.clone()
    packed = awq.quantize(weight, config, stats)
    assert torch.equal(weight, before)
    assert (
        packed.scale.dtype == torch.float16 and packed.zero is not None and packed.zero.dtype == torch.uint8
    )
    if not zero_point:
        assert (packed.zero == 8).all() and (packed.scale > 0).all()
    back = awq.from_checkpoint(awq.to_checkpoint(packed, config), config, (24, 64))
    assert torch.equal(dequantize(back), dequantize(packed))
    assert float((dequantize(packed) - weight).norm() / weight.norm()) < 0.15


def test_quantize_without_tokens_says_so() -> None:
    take_notes()
    packed = awq.quantize(torch.randn(8, 32), AWQConfig(group_size=32), LayerStats(0, torch.zeros(32, 32)))
    assert torch.isfinite(dequantize(packed)).all()
    assert any("no calibration tokens" in n for n in take_notes())


# --- peers ------------------------------------------------------------------------------------------


def peer_python(name: str) -> Path:
    root = os.environ.get("QUANTKIT_PEERS", "")
    python = Path(root) / name / "bin" / "python"
    if not root or not python.exists():
        pytest.skip(f"QUANTKIT_PEERS does not hold {name}")
    return python


def write_tokenizer(path: Path) -> None:
    """AutoAWQ and gptqmodel load a tokenizer beside the model, with a pad token."""
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(125)} | {"<s>": 125, "</s>": 126, "<pad>": 127}
    Tokenizer(models.WordLevel(words, unk_token="<pad>")).save(str(path / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (path / "tokenizer_config.json").write_text(json.dumps(special))


def write_tiny(path: Path, skip_down: bool) -> tuple[Tensor, Tensor]:
    """A tiny Llama in AWQ's files; `(ids, logits)` of what quantkit thinks they hold."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.float32).eval()
    options = AWQConfig(group_size=64 if skip_down else 32)
    state, quantized, skipped = {}, {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        fit = awq.fit(tuple(module.weight.shape), options)
        if fit.config is None:
            skipped[name] = fit.note
            continue
        packed = awq.quantize(module.weight.data, options, None)
        module.weight.data.copy_(dequantize(packed))
        quantized[name] = options
        state.update({f"{name}.{k}": v for k, v in awq.to_checkpoint(packed, options).items()})
    for key, value in model.state_dict().items():
        if key.removesuffix(".weight") not in quantized:
            state[key] = value.half()
    path.mkdir()
    save_file({k: v.contiguous() for k, v in state.items()}, path / "model.safetensors", {"format": "pt"})
    written = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    written["quantization_config"] = awq.to_hf_config(QuantizedLayers(options, quantized, skipped))
    (path / "config.json").write_text(json.dumps(written, default=str))
    write_tokenizer(path)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        return ids, model(ids).logits


@pytest.mark.peer
@pytest.mark.parametrize(
    "peer, loader", [("autoawq", "autoawq"), ("new", "transformers"), ("new", "gptqmodel")]
)
@pytest.mark.parametrize("skip_down", [False, True])
def test_peers_read_our_files(tmp_path: Path, peer: str, loader: str, skip_down: bool) -> None:
    python = peer_python(peer)
    script = ROOT / "scripts" / "peers" / "logits.py"
    if not script.exists():
        pytest.skip("scripts/peers/logits.py is not here")
    ids, mine = write_tiny(tmp_path / "model", skip_down)
    np.save(tmp_path / "ids.npy", ids.numpy())
    command = [python, script, "--loader", loader, "--model", tmp_path / "model"]
    command += ["--ids", tmp_path / "ids.npy", "--out", tmp_path / "logits.npy", "--dtype", "float16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    assert float((theirs - mine).norm() / mine.norm()) < 5e-3
