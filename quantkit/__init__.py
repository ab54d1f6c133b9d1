"""quantkit: quantize, run, evaluate and export Hugging Face checkpoints."""

__version__ = "0.1.0"
