"""What an export reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from quantkit.export.proof import Proof


@dataclass
class ExportResult:
    """Sizes in bytes, seconds, counts of graph nodes (or binaries) by type, and the proof.

    `proof` is None for kernels that no GPU here can run; a notice says so.
    """

    checkpoint: str
    output: str
    target: str
    layout: str | None
    checkpoint_bytes: int
    artifact_bytes: int
    nodes: dict[str, int]
    proof: Proof | None
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
