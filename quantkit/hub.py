"""`resolve_model`: a path or a Hugging Face hub id -> a local directory."""

from __future__ import annotations

import os
import re
from pathlib import Path

from quantkit.errors import CheckpointError
from quantkit.untrusted import existing_directory, show

#: Weights as safetensors, and everything small that a model directory needs. Code files come along
#: because a model with remote code is unusable without them; they are copied, never imported.
_WANTED = [
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "tokenizer*"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
]
#: Second copies of the weights that some repositories hold.
_UNWANTED = ["consolidated*", "original/*", "onnx/*", "openvino/*", "gguf/*", "checkpoint-*", "runs/*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


def resolve_model(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The directory of `model`: itself if it exists, else downloaded from the hub (or its cache).

    Only safetensors, JSON, tokenizer, template and licence files are fetched. CheckpointError, in
    one line, when it is neither a directory nor something the hub gives us.
    """
    text = os.fspath(model)
    path = Path(text).expanduser()
    if not text.strip():
        raise CheckpointError("The model's name is empty", hint="Give a model directory or a hub id.")
    try:
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, ValueError):
        exists = True
    if exists:
        existing_directory(path)  # raises, saying what is wrong with it
    if isinstance(model, Path) or not _looks_like_hub_id(text):
        raise CheckpointError(f"{show(path)} does not exist{_nearby(path)}", hint="Check the path.")
    return _download(text, revision)


def _looks_like_hub_id(text: str) -> bool:
    reserved = "--" in text or ".." in text or text.endswith(".git")  # the hub refuses these
    return bool(_HUB_ID.fullmatch(text)) and not reserved


def _nearby(path: Path) -> str:
    """ " (did you mean ...)" when a neighbour has nearly that name."""
    import difflib

    try:
        names = [e.name for e in path.parent.iterdir() if e.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {show(path.parent / close[0])}?)" if close else ""


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = f" at revision {show(revision)}" if revision else ""
    missing = f"There is no directory {show(repo)}{_nearby(Path(repo))}"
    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
        )
    except errors.GatedRepoError:
        raise CheckpointError(
            f"The hub model {repo} is gated", hint="Accept its terms on the hub and log in (hf auth login)."
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"The hub model {repo} has no revision {show(revision)}") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{missing}, and the hub has no model {repo}",
            hint="Check the spelling; private models need a login.",
        ) from None
    except errors.HFValidationError as error:
        raise CheckpointError(f"{missing}, and {show(repo)} is no hub id: {show(error)}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"{missing}, and the hub model {repo}{at} cannot be fetched ({show(_first_line(error), 100)})",
            hint="Check the path, or the network; with HF_HUB_OFFLINE only cached models are found.",
        ) from None
    except Exception as error:  # the hub's client raises its transport's own errors too
        raise CheckpointError(
            f"{missing}, and fetching {repo}{at} from the hub failed: {show(_first_line(error), 100)}"
        ) from None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
