"""A quantization_config that lies about its tensors, and packed tensors that lie about their codes.

For every layout a tiny Llama is converted once; each attack spoils a copy. `load` (through `eval`) and
`verify` must refuse or report it, naming the layer or the key; `inspect` must never crash.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_support import edit_json, edit_tensors, first_tensor, quantkit_command, refused

import quantkit

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("nf4", {"double_quant": False}),
    "gptq": ("gptq", {"group_size": 32, "desc_act": True}),
    "awq": ("awq", {"group_size": 32}),
    "hqq": ("hqq", {"group_size": 32}),
    "fp8": ("fp8", {}),
    "ternary": ("ternary", {}),
    "ct": ("fp8", {"layout": "compressed-tensors", "scheme": "channel"}),
}


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> Callable[[str], Path]:
    """`made("gptq")` -> directory of the converted checkpoint."""
    done: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in done:
            fmt, options = OPTIONS[kind]
            done[kind] = tmp_path_factory.mktemp("made") / kind
            ids = torch.randint(3, 256, (4, 32), generator=torch.Generator().manual_seed(0))
            quantkit.convert(
                tiny("llama"), done[kind], format=fmt, options=options, calibration=ids, samples=4, seqlen=32
            )
        return done[kind]

    return make


#: name -> (checkpoint, what it spoils, words that `eval` must say)
ATTACKS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {}


def config(name: str, kind: str, words: list[str], **changes: Any) -> None:
    """Change keys of quantization_config; `None` with the key `drop` removes them."""

    def spoil(path: Path) -> list[str]:
        def change(content: dict) -> None:
            mapping = content["quantization_config"]
            for key in changes.get("drop", ()):
                del mapping[key]
            mapping.update({key: value for key, value in changes.items() if key != "drop"})

        edit_json(path / "config.json", change)
        return words

    ATTACKS[name] = (kind, spoil)


def tensor(name: str, kind: str, pattern: str, change: Callable[[torch.Tensor], Any], *words: str) -> None:
    """Replace (or with a `change` that gives None, remove) the first tensor that matches `pattern`."""

    def spoil(path: Path) -> list[str]:
        found = first_tensor(path, pattern)

        def edit(tensors: dict[str, torch.Tensor]) -> None:
            value = change(tensors.pop(found).clone())
            if value is not None:
                tensors[found] = value

        edit_tensors(path, edit)
        layer = re.match(r"model\.layers\.\d+\.\w+\.\w+", found)
        return [layer[0] if layer else found, *words]

    ATTACKS[name] = (kind, spoil)


def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(given: torch.Tensor) -> torch.Tensor:
        given.view(-1)[-1:] = value
        return given

    return change


EVIL = "(a+)+$"
config("method_unknown", "gptq", ["quant_method", "evil"], quant_method="evil")
config("method_a_list", "gptq", ["quant_method"], quant_method=["gptq"])
config("method_missing", "gptq", ["quant_method"], drop=["quant_method"])
config(
    "method_of_another_layout", "gptq", ["not supported"], quant_method="awq", version="gemm", zero_point=True
)
config("gptq_wrong_bits", "gptq", ["qweight"], bits=8)
config("gptq_bits_5", "gptq", ["bits"], bits=5)
config("gptq_bits_as_text", "gptq", ["bits"], bits="4")
config("gptq_bits_huge", "gptq", ["bits"], bits=10**30)
config("gptq_wrong_group", "gptq", ["shape"], group_size=64)
config("gptq_group_zero", "gptq", ["group_size"], group_size=0)
config("gptq_group_missing", "gptq", ["group_size"], drop=["group_size"])
config("gptq_version", "gptq", ["checkpoint_format"], checkpoint_format="gptq_v9")
config("gptq_marlin", "gptq", ["marlin"], is_marlin_format=True)
config("gptq_pattern_never_ends", "gptq", ["dynamic", "too long"], dynamic={f"+:{EVIL}": {"bits": 4}})
config("gptq_pattern_broken", "gptq", ["dynamic"], dynamic={"+:((": {"bits": 4}})
config("gptq_pattern_doubtful", "gptq", ["dynamic"], dynamic={"+:[[a]]": {"bits": 4}})
config("gptq_dynamic_a_list", "gptq", ["dynamic"], dynamic=[1])
config("awq_version", "awq", ["version"], version="gemv_evil")
config("awq_bits", "awq", ["bits"], bits=3)
config("hqq_empty", "hqq", ["quant_config"], quant_config={})
config(
    "hqq_bits",
    "hqq",
    ["nbits"],
    quant_config={"weight_quant_params": {"nbits": 99, "group_size": 32, "axis": 1}},
)
config("fp8_block", "fp8", ["weight_block_size"], weight_block_size=[0, 128])
config("fp8_scheme", "fp8", ["activation_scheme"], activation_scheme="evil")
config("bitnet_class", "ternary", ["linear_class"], linear_class="os.system")
config("ct_no_groups", "ct", ["config_groups"], config_groups={})
config("ct_pattern_never_ends", "ct", ["targets", "too long"],
       config_groups={"group_0": {"targets": [f"re:{EVIL}"], "weights": {"num_bits": 8, "type": "float"}}})  # fmt: skip
config("ct_pattern_broken", "ct", ["targets"],
       config_groups={"group_0": {"targets": ["re:(("], "weights": {"num_bits": 8, "type": "float"}}})  # fmt: skip
config("ct_control_characters", "ct", ["config_groups"], config_groups={"\x1b[2J\x7f": 5})

tensor("gptq_scales_missing", "gptq", r"q_proj\.scales$", lambda t: None, "scales")
tensor("gptq_zeros_missing", "gptq", r"q_proj\.qzeros$", lambda t: None, "qzeros")
tensor("gptq_codes_short", "gptq", r"q_proj\.qweight$", lambda t: t[:-1], "qweight", "shape")
tensor("gptq_codes_as_floats", "gptq", r"q_proj\.qweight$", lambda t: t.float(), "qweight", "dtype")
tensor("gptq_scale_nan", "gptq", r"q_proj\.scales$", put(float("nan")), "scales", "NaN")
tensor("gptq_scale_inf", "gptq", r"q_proj\.scales$", put(float("inf")), "scales")
tensor("gptq_g_idx_beyond", "gptq", r"q_proj\.g_idx$", put(99), "g_idx")
tensor("gptq_g_idx_negative", "gptq", r"q_proj\.g_idx$", put(-7), "g_idx")
tensor("gptq_g_idx_short", "gptq", r"q_proj\.g_idx$", lambda t: t[:-1], "g_idx")
tensor("awq_zeros_missing", "awq", r"q_proj\.qzeros$", lambda t: None, "qzeros")
tensor("awq_codes_short", "awq", r"q_proj\.qweight$", lambda t: t[:, :-1], "qweight")
tensor("awq_scale_nan", "awq", r"q_proj\.scales$", put(float("nan")), "scales")
tensor("hqq_scale_inf", "hqq", r"q_proj\.scale$", put(float("inf")), "scale")
tensor("hqq_zero_nan", "hqq", r"q_proj\.zero$", put(float("nan")), "zero")
tensor("hqq_codes_short", "hqq", r"q_proj\.W_q$", lambda t: t[:-1], "W_q")
tensor("hqq_shape_lies", "hqq", r"q_proj\.shape$", lambda t: t * 2, "shape")
tensor("hqq_shape_huge", "hqq", r"q_proj\.shape$", lambda t: t * 0 + 2**31, "shape")
tensor("hqq_bits_beyond", "hqq", r"q_proj\.nbits$", lambda t: t * 0 + 77, "nbits")
tensor("nf4_absmax_nan", "nf4", r"q_proj\.weight\.absmax$", put(float("nan")), "absmax")
tensor("nf4_absmax_short", "nf4", r"q_proj\.weight\.absmax$", lambda t: t[:-1], "absmax")
tensor("nf4_table_of_another", "nf4", r"q_proj\.weight\.quant_map$", put(5.0), "quant_map")
tensor("nf4_state_not_json", "nf4", r"q_proj.*quant_state", lambda t: t[:-3], "quant_state")
tensor("nf4_codes_short", "nf4", r"q_proj\.weight$", lambda t: t[:-1], "weight")
tensor("fp8_scale_nan", "fp8", r"q_proj\.weight_scale_inv$", put(float("nan")), "weight_scale_inv")
tensor("fp8_scale_missing", "fp8", r"q_proj\.weight_scale_inv$", lambda t: None)
tensor("fp8_weight_nan", "fp8", r"q_proj\.weight$",
       lambda t: t.view(torch.uint8).fill_(0x7F).view(torch.float8_e4m3fn), "NaN")  # fmt: skip
tensor("fp8_weight_as_bytes", "fp8", r"q_proj\.weight$", lambda t: t.view(torch.uint8), "dtype")
tensor("ternary_code_3", "ternary", r"q_proj\.weight$", lambda t: t.fill_(255), "weight")
tensor("ternary_scale_zero", "ternary", r"q_proj\.weight_scale$", lambda t: t * 0, "weight_scale")
tensor("ternary_scale_two", "ternary", r"q_proj\.weight_scale$", lambda t: torch.cat([t, t]), "weight_scale")
tensor("ct_scale_inf", "ct", r"q_proj\.weight_scale$", put(float("inf")), "weight_scale")


@pytest.mark.parametrize("name", ATTACKS)
def test_eval_verify_and_inspect_refuse(name: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    kind, spoil = ATTACKS[name]
    path = tmp_path / "model"
    shutil.copytree(made(kind), path)
    words = spoil(path)
    refused("eval", path, "--tokens", "64", "--window", "32", "--cache", "none", words=words)
    code, out, err = quantkit_command("verify", path, "--loader", "none")
    assert code not in (0, 70), (out, err)
    code, out, err = quantkit_command("inspect", path)
    assert code != 70 and "Traceback" not in err, err
    code, out, err = quantkit_command("convert", path, "--format", "nf4", "-o", tmp_path / "again")
    assert code not in (0, 70) and not (tmp_path / "again").exists(), err


def test_the_good_ones_are_not_refused(made: Callable[[str], Path]) -> None:
    """Otherwise nothing above would mean anything."""
    for kind in OPTIONS:
        arguments = ["--tokens", "64", "--window", "32", "--cache", "none"]
        code, _, err = quantkit_command("eval", made(kind), *arguments)
        assert code == 0, (kind, err)
        assert quantkit_command("verify", made(kind), "--loader", "none")[0] == 0, kind
