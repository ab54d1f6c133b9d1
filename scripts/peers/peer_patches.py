"""Small adaptations of peers: skipped GPU checks, and llm-compressor's modifiers by name."""

from __future__ import annotations

from collections import defaultdict
from typing import Any


def allow_hqq_without_gpu(dtype: Any) -> None:
    """transformers 4.51 demands CUDA for hqq, although its layers run on any device."""
    from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

    def validate_environment(self: Any, *args: Any, **kwargs: Any) -> None:
        self.torch_dtype = dtype

    HqqHfQuantizer.validate_environment = validate_environment


def allow_fp8_without_gpu() -> None:
    """transformers refuses to quantize to fp8 without a GPU; rounding weights needs none."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    FineGrainedFP8HfQuantizer.validate_environment = lambda self, *args, **kwargs: None


def allow_autoawq_without_ipex() -> None:
    """autoawq loads on "cpu" with Intel's extension only; its plain torch path takes any other name."""
    import awq.models.base

    awq.models.base.get_best_device = lambda: "cpu:0"


def plain_bitsandbytes_on_cpu(model: Any) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes 0.50 repacks 4-bit weights at the first evaluation.

    That rounds absmax to bfloat16, and fails ("shape '[64, 1]' is invalid for input of size 96") where
    in_features is no multiple of the block. Its other CPU path reads the file as it is.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def keep_autoawq_weights_apart() -> None:
    """autoawq keeps the weights it tries scales on with `.cpu()`, which copies on a GPU only.

    On a CPU the kept tensor is the weight itself: the first trial's `mul_` stays in it, and every layer
    ends up multiplied by the scales of ratio 0. A clone restores what a GPU does.
    """
    from awq.quantize.quantizer import AwqQuantizer

    search = AwqQuantizer._compute_best_scale

    def with_copies(
        self: Any, x: Any, w_mean: Any, x_mean: Any, module: Any, *args: Any, **kwargs: Any
    ) -> Any:
        state_dict = module.state_dict
        module.state_dict = lambda: {name: value.clone() for name, value in state_dict().items()}
        try:
            return search(self, x, w_mean, x_mean, module, *args, **kwargs)
        finally:
            del module.state_dict

    AwqQuantizer._compute_best_scale = with_copies


def leave_out_autoawq_layers(model: Any, part: str) -> None:
    """autoawq searches scales for modules_to_not_convert too, and asserts their shapes; leave them out."""
    every = model.get_layers_for_scaling

    def wanted(layer: Any, inputs: dict[str, Any], kwargs: Any) -> list[dict[str, Any]]:
        names = {id(module): name for name, module in layer.named_modules()}
        found = every(layer, defaultdict(lambda: None, inputs), kwargs)  # no inputs of layers left out
        return [group for group in found if all(part not in names[id(linear)] for linear in group["layers"])]

    model.get_layers_for_scaling = wanted


def llmcompressor_modifier(
    algorithm: str,
    scheme: str,
    group_size: int | None,
    desc_act: bool | None,
    damp: float | None,
    ignore: list[str],
) -> tuple[Any, dict[str, Any]]:
    """The modifier for an algorithm name, and the options it was given."""
    options: dict[str, Any] = {"targets": ["Linear"], "ignore": ignore}
    if group_size is None:
        options["scheme"] = scheme
    else:  # a preset's scheme with another group size
        from compressed_tensors.quantization import preset_name_to_scheme

        preset = preset_name_to_scheme(scheme, options.pop("targets"))
        preset.weights.group_size = group_size
        options["config_groups"] = {"group_0": preset}
    if algorithm == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        if damp is not None:
            options["dampening_frac"] = damp
        if desc_act is not None:
            options["actorder"] = "group" if desc_act else None
        return GPTQModifier(**options), options
    if algorithm == "awq":
        from llmcompressor.modifiers.awq import AWQModifier
        from llmcompressor.pipelines.cache import IntermediatesCache

        # AWQ pins its cache for a device; without one torch refuses, and nothing is gained by it.
        IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None
        return AWQModifier(**options), options
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return QuantizationModifier(**options), options
