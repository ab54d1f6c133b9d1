"""Building a transformers model without its weights, from a config.json that nobody vouches for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.config_checks import check_config
from quantkit.errors import ConfigError


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' chatter for as long as the block runs; errors still raise."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def build_meta_model(path: Path, config: dict[str, Any], trust_remote_code: bool) -> tuple[Any, Any]:
    """(PretrainedConfig, model on the meta device); ConfigError naming what is wrong."""
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    where = path / "config.json"
    check_config(config, where, trust_remote_code)
    with quiet_transformers():
        try:
            hf_config = AutoConfig.from_pretrained(
                path, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:
            raise ConfigError(f"{where}: {error}", hint=_remote_hint(config, trust_remote_code)) from error
        if getattr(hf_config, "quantization_config", None) is not None:
            del hf_config.quantization_config
        architectures = config.get("architectures") or []
        arch = architectures[0] if isinstance(architectures, list) and architectures else None
        cls = getattr(transformers, arch, None) if isinstance(arch, str) else None
        try:
            with torch.device("meta"):
                if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
                    model = cls._from_config(hf_config) if hasattr(cls, "_from_config") else cls(hf_config)
                elif trust_remote_code and config.get("auto_map"):
                    model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=True)
                elif arch is not None:
                    raise ConfigError(
                        f"{where}: architecture {arch!r} is unknown to transformers {transformers.__version__}",
                        hint=_remote_hint(config, trust_remote_code),
                    )
                elif type(hf_config) in AutoModelForCausalLM._model_mapping:
                    model = AutoModelForCausalLM.from_config(hf_config)
                else:
                    model = AutoModel.from_config(hf_config)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{where}: transformers cannot build {arch or 'the model'} from it ({type(error).__name__}: {error})",
                hint="Correct config.json.",
            ) from error
    model.eval()
    return hf_config, model


def _remote_hint(config: dict[str, Any], trusted: bool) -> str:
    if config.get("auto_map") and not trusted:
        return "The checkpoint wants to run its own code; --trust-remote-code permits that if you trust it."
    return "Check model_type and architectures, or install a newer transformers."


def checkpoint_renamings(model: nn.Module) -> list[Any]:
    """transformers' own checkpoint renamings for this model (old names -> current names)."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # an internal module: another transformers may have moved it
        return []
    return [t for t in get_model_conversion_mapping(model) if not isinstance(t, WeightConverter)]
