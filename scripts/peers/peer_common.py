"""What the peer drivers share: calibration tokens, staging of a source folder, measurement.

Nothing here imports torch or a peer at module level, so that import time stays out of the timings.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
REPORTED_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "optimum",
    "gptqmodel",
    "autoawq",
    "hqq",
    "bitsandbytes",
    "compressed-tensors",
    "llmcompressor",
)


def prepare_environment() -> None:
    """Settings every peer needs on a CPU machine without network; call before importing torch."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # hqq and transformers' bitnet decorate with torch.compile, which would start a C++ compiler.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter for a comparison."""
    found = {"python": sys.version.split()[0]}
    for name in REPORTED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")


def dtype_of(name: str, model: Path) -> Any:
    """`auto` is the dtype that config.json names."""
    import torch

    if name == "auto":
        config = read_json(model / "config.json")
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, name)


# --- calibration -------------------------------------------------------------------------------


def read_calibration(path: Path, model: Path, samples: int | None, seqlen: int | None) -> list[list[int]]:
    """Token rows of one length: a .jsonl's rows as they are, any other file tokenised and chopped."""
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line)["input_ids"] for line in lines if line.strip()]
        seqlen = seqlen or len(rows[0])
        odd = next((index for index, row in enumerate(rows) if len(row) != seqlen), None)
        if odd is not None:
            raise SystemExit(f"{path}: row {odd} has {len(rows[odd])} tokens, not {seqlen}")
    else:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
        ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        seqlen = seqlen or 512
        rows = [ids[start : start + seqlen] for start in range(0, len(ids) - seqlen + 1, seqlen)]
    if samples is not None and len(rows) < samples:
        raise SystemExit(f"{path}: {len(rows)} rows of {seqlen} tokens, {samples} asked for")
    if not rows:
        raise SystemExit(f"{path}: no row of {seqlen} tokens")
    return rows[:samples]


# --- staging -----------------------------------------------------------------------------------


def _config_for_transformers4(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 4.x ignores `rope_parameters` (theta would silently be 10000) and `dtype`."""
    config = dict(config)
    rope = config.pop("rope_parameters", None)
    if rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if "dtype" in config:
        config.setdefault("torch_dtype", config.pop("dtype"))
    return config


def _tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    """A class name that 4.x knows as well, and the pad token that gptqmodel insists on."""
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.setdefault("pad_token", config.get("eos_token") or config.get("unk_token"))
    return config


@contextmanager
def staged(model: Path, *, drop_quantization: bool = False) -> Iterator[Path]:
    """A temporary folder of links to `model`, with the small files rewritten for this environment."""
    legacy = metadata.version("transformers").startswith("4.")
    with tempfile.TemporaryDirectory(prefix="peer-") as name:
        folder = Path(name)
        for source in model.iterdir():
            target = folder / source.name
            if source.name == "config.json":
                config = read_json(source)
                if drop_quantization:
                    config.pop("quantization_config", None)
                write_json(target, _config_for_transformers4(config) if legacy else config)
            elif source.name == "tokenizer_config.json":
                write_json(target, _tokenizer_config(read_json(source)))
            else:
                target.symlink_to(source.resolve())
        yield folder


def copy_tokenizer(model: Path, out: Path) -> None:
    """The source's tokenizer files, unchanged, beside the peer's weights."""
    for name in TOKENIZER_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, out / name)


# --- measurement -------------------------------------------------------------------------------


def _status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise KeyError(key)


@dataclass
class Meter:
    """Wall and CPU seconds per named phase, and the peak resident memory since construction."""

    phases: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:  # 5 sets the kernel's high-water mark back to the present size
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.peak_is_exact = True
        except OSError:
            self.peak_is_exact = False
        self.base_kib = _status_kib("VmRSS")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.phases[name] = time.perf_counter() - start
            self.cpu[name] = time.process_time() - cpu_start

    def report(self) -> dict[str, Any]:
        return {
            "seconds": {name: round(value, 4) for name, value in self.phases.items()},
            "cpu_seconds": {name: round(value, 4) for name, value in self.cpu.items()},
            "load_average_at_end": os.getloadavg()[0],
            "base_rss_mib": round(self.base_kib / 1024, 1),
            "peak_rss_over_base_mib": round((_status_kib("VmHWM") - self.base_kib) / 1024, 1),
            "peak_counted_from_base": self.peak_is_exact,
        }


def write_timing(
    out: Path, meter: Meter, args: argparse.Namespace, used: dict[str, Any], source: Path
) -> None:
    """`timing.json`: what was measured, by which versions, with which options."""
    import torch

    report = {
        "tool": args.tool,
        "source": str(source),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "arguments": {key: value for key, value in vars(args).items() if key != "tool"},
        "options": used,
        **meter.report(),
    }
    write_json(out / "timing.json", report)
    print(
        json.dumps(
            {"out": str(out), "seconds": report["seconds"], "peak_mib": report["peak_rss_over_base_mib"]}
        )
    )
