"""Running an exported ONNX decoder with onnxruntime."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.export import unrounded
from quantkit.export.onnx_graph import MODEL, CacheShape, names


class OnnxRunner:
    """A `proof.Runner` over `folder/model.onnx`; the cache lives in the object."""

    def __init__(
        self, folder: Path, shape: CacheShape, *, use_cache: bool, level: int, graph: bytes | None = None
    ) -> None:
        self.session = open_session(folder / MODEL, level, graph)
        self.takes_positions = any(i.name == "position_ids" for i in self.session.get_inputs())
        self.shape, self.use_cache = shape, use_cache
        self.past: list[Any] = []

    @staticmethod
    def unrounded(folder: Path, shape: CacheShape, *, use_cache: bool) -> OnnxRunner:
        """The same file with the rounding of activations taken out of its graph."""
        graph = unrounded.onnx_bytes(folder / MODEL)
        return OnnxRunner(folder, shape, use_cache=use_cache, level=1, graph=graph)

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, list[Tensor]]:
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        if self.takes_positions:
            feeds["position_ids"] = positions.numpy()
        if self.use_cache:
            if not self.past or mask.shape[1] == ids.shape[1]:
                empty = torch.zeros(ids.shape[0], self.shape.heads, 0, self.shape.size).numpy()
                self.past = [empty] * (2 * self.shape.layers)
            feeds.update(zip(names(self.shape, "past_key_values"), self.past))
        logits, *self.past = self.session.run(None, feeds)
        return torch.from_numpy(logits), [torch.from_numpy(t) for t in self.past]

    def tokens_per_second(self, steps: int = 10) -> float:
        """Median decode speed of one row."""
        one = torch.ones(1, 1, dtype=torch.int64)
        self(one, one, one * 0)
        times = []
        for i in range(1, steps + 1):
            start = time.perf_counter()
            self(one, torch.ones(1, i + 1, dtype=torch.int64), one * i)
            times.append(time.perf_counter() - start)
        return 1 / sorted(times)[len(times) // 2]


def open_session(path: Path, level: int, graph: bytes | None = None) -> Any:
    """An onnxruntime session on the CPU with as many threads as torch has.

    `graph`: another graph in place of the one in `path`, over the weights that lie beside it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Or onnxruntime fuses DequantizeLinear + MatMul with int8 activations on its own account.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    if graph is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
    options.intra_op_num_threads = torch.get_num_threads()
    source = str(path) if graph is None else graph
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
