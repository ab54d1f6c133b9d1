"""The model card (README.md) that a conversion writes beside the weights.

What comes from the source (its name, its licence, its layers' names) is data: it is escaped and
inserted as values, never rendered as a template. The YAML header is made by a YAML writer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quantkit
from quantkit.report_types import ConvertResult, remarks

if TYPE_CHECKING:
    import jinja2

_HEAD_LIMIT = 256 * 1024  # characters of a source card that are looked at
#: What is carried over from the source's card. Everything else there describes other weights.
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")

_TEMPLATE = """\
# {{ title | cell }}

{% if local -%}
`{{ base_model | code }}` (a local directory)
{%- else -%}
[`{{ base_model | code }}`](https://huggingface.co/{{ base_model }})
{%- endif %}, quantized to **{{ format }}** with quantkit {{ version }}.

| | before | after |
|---|---|---|
| size of all tensors | {{ size_before }} | {{ size_after }} ({{ ratio }}) |
| bits per weight, quantized layers | | {{ bpw }} |
| bits per weight, whole model | | {{ bpw_model }} |

{{ quantized }} linear layers are quantized, {{ kept | length }} were kept as they are.

## How it was made

```bash
{{ command }}
```

| option | value |
|---|---|
{% for key, value in options -%}
| {{ key | cell }} | {{ value | cell }} |
{% endfor %}
{% if calibration -%}
Calibration data:

| | |
|---|---|
{% for key, value in calibration -%}
| {{ key | cell }} | {{ value | cell }} |
{% endfor %}
{%- else -%}
No calibration data was used.
{%- endif %}
{% if provenance %}
| provenance | |
|---|---|
{% for key, value in provenance -%}
| {{ key | cell }} | {{ value | cell }} |
{% endfor %}
The hashes of all files that were read and written are in quantkit_manifest.json; `quantkit verify` checks them.
{% endif %}

## What it cost

Relative errors of the layers with the largest ones (of the weight; of the layer's output on the
calibration data, where there is any). These are not perplexities: measure those with `quantkit eval`.

| layer | options | weight error | output error |
|---|---|---|---|
{% for layer in worst -%}
| `{{ layer.name | code }}` | {{ layer.options | cell }} | {{ layer.weight_error }} | {{ layer.output_error }} |
{% endfor %}
{%- if notes %}
Remarks:

{% for note in notes -%}
- {{ note | cell }}
{% endfor %}
{%- endif %}
{%- if kept %}
Kept unquantized:

{% for reason, names in kept_by_reason -%}
- {{ reason | cell }}: {{ names | cell }}
{% endfor %}
{%- endif %}
## How to load it

{% for snippet in snippets -%}
{{ snippet.title }}:

```{{ snippet.language }}
{{ snippet.code }}
```

{% endfor %}
{%- if license -%}
## Licence

The licence of the base model applies to these weights: {{ license | cell }}.
{% endif %}"""


@dataclass(frozen=True)
class Snippet:
    """How one tool loads a checkpoint."""

    title: str
    language: str
    code: str


def render_model_card(
    result: ConvertResult,
    *,
    base_model: str,
    loaders: Sequence[str] = (),
    source_card: Path | None = None,
    command: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """The text of README.md for a finished conversion.

    Parameters
    ----------
    result: what was done; `result.output` may still be None.
    base_model: the model as it was asked for: a hub id or a directory.
    loaders: `Layout.loaders` of the format.
    source_card: README.md of the source, whose licence is carried over; may be absent.
    command: the exact command; by default the running `quantkit` command, else the Python call.
    provenance: what goes into the manifest under that name; its source and versions are shown.
    """
    source = front_matter(source_card) if source_card is not None else {}
    local = not is_hub_id(base_model)
    name = Path(base_model).name if local else base_model
    carried = {key: source[key] for key in _CARRIED if key in source}
    output = Path(result.output).name if result.output else "OUT"
    revision = ((provenance or {}).get("source") or {}).get("revision")
    header = {
        **carried,
        **({} if local else {"base_model": name, "base_model_relation": "quantized"}),
        **({"base_model_revision": revision} if revision and not local else {}),
        "quantized_by": "quantkit",
        "tags": [
            "quantkit",
            result.format,
            *(["quantized"] if result.format != "fp8" else ["fp8-quantized"]),
        ],
    }
    quantized = result.quantized
    body = (
        _environment()
        .from_string(_TEMPLATE)
        .render(
            title=one_line(f"{name} {result.format}"),
            base_model=name,
            local=local,
            format=result.format,
            version=quantkit.__version__,
            size_before=_size(result.size_before),
            size_after=_size(result.size_after),
            ratio=f"{result.size_after / result.size_before:.1%}" if result.size_before else "",
            bpw=f"{result.bits_per_weight:.3f}",
            bpw_model=f"{result.bits_per_weight_model:.3f}",
            quantized=len(quantized),
            kept=result.kept,
            kept_by_reason=_kept_by_reason(result),
            command=_fenced(command or running_command() or _python_call(result, name)),
            options=sorted(result.options.items()),
            calibration=list((result.calibration or {}).items()),
            provenance=_provenance(provenance or {}),
            worst=[_row(layer) for layer in result.worst_layers(10)],
            notes=_notes(result),
            snippets=snippets(loaders, output),
            license=_license(source),
        )
    )
    return f"---\n{_yaml(header)}---\n\n{body.rstrip()}\n"


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML header of a model card, strings and lists of strings only; {} when there is none.

    The card comes with the checkpoint, so it is untrusted: `yaml.safe_load`, size-limited, and nothing
    but plain text is kept.
    """
    import yaml

    try:
        if not card.is_file():
            return {}
        with card.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_HEAD_LIMIT)
    except OSError:
        return {}
    match = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    # Aliases can blow a few bytes up to gigabytes; no real card has them.
    if not match or re.search(r"(^|[\s\[,:-])[&*]\w", match[1]):
        return {}
    try:
        loaded = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    result: dict[str, Any] = {}
    for key, value in loaded.items() if isinstance(loaded, dict) else ():
        if not isinstance(key, str):
            continue
        if isinstance(value, str):
            result[key] = one_line(value)
        elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            result[key] = [one_line(item) for item in value]
    return result


def snippets(loaders: Sequence[str], output: str) -> list[Snippet]:
    """How to load the files, for those of the format's loaders that we have words for."""
    found = [Snippet("quantkit", "bash", f"quantkit generate {output} --prompt 'Once upon a time'")]
    for loader in loaders:
        key = loader.lower()
        if key.startswith("transformers"):
            code = (
                "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                f'model = AutoModelForCausalLM.from_pretrained("{output}", device_map="auto")\n'
                f'tokenizer = AutoTokenizer.from_pretrained("{output}")'
            )
            found.append(Snippet(loader, "python", code))
        elif key.startswith("vllm"):
            found.append(Snippet(loader, "bash", f"vllm serve {output}"))
        elif key.startswith("sglang"):
            found.append(Snippet(loader, "bash", f"python -m sglang.launch_server --model-path {output}"))
        elif key.startswith("gptqmodel"):
            code = f'from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load("{output}")'
            found.append(Snippet(loader, "python", code))
    return found


def is_hub_id(model: str) -> bool:
    """Whether a model was named by hub id rather than by a directory."""
    return not Path(model).expanduser().exists() and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model))


def one_line(text: object, limit: int = 300) -> str:
    """Text as one printable line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def running_command() -> str | None:
    """The `quantkit` command that is running, or None when the API is called from Python.

    Flags that do not change the result are left out: a resumed conversion must write the same bytes.
    """
    import sys

    guard = sys.modules.get("quantkit.cli.guard")
    if guard is None or not guard.COMMAND:
        return None
    line: str = guard.command_line(without=("--resume", "--overwrite", "--json", "--debug"))
    return line


def _code(text: object) -> str:
    return one_line(text).replace("`", "'").replace("|", "\\|")


def _cell(text: object) -> str:
    """Text inside a table or list: no markup of its own, no HTML."""
    line = one_line(text)
    line = re.sub(r"([\\`*_\[\]|])", r"\\\1", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _fenced(text: str) -> str:
    return one_line(text, 4000).replace("```", "'''")


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=False)
    environment.filters.update(code=_code, cell=_cell)
    return environment


def _yaml(header: Mapping[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True, width=1000)
    return text


def _size(nbytes: int) -> str:
    from quantkit.progress import size

    return size(nbytes)


def _row(layer: Any) -> dict[str, str]:
    options = ", ".join(
        f"{k}={v}" for k, v in layer.options.items() if k in ("bits", "group_size", "block_size")
    )
    output = "" if layer.output_error is None else f"{layer.output_error:.5f}"
    return {
        "name": layer.name,
        "options": options,
        "weight_error": f"{layer.weight_error:.5f}",
        "output_error": output,
    }


def _notes(result: ConvertResult, limit: int = 20) -> list[str]:
    notes = [one_line(text) for text in (*result.warnings, *remarks(result))]
    if len(notes) > limit:
        notes = [*notes[:limit], f"and {len(notes) - limit} more, see quantkit_manifest.json"]
    return notes


def _provenance(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows about where the weights come from and what made them."""
    source = facts.get("source") or {}
    rows = [(f"source {key}", str(source[key])) for key in ("revision", "fingerprint") if source.get(key)]
    return rows + [(f"{name} version", str(number)) for name, number in (facts.get("versions") or {}).items()]


def _kept_by_reason(result: ConvertResult) -> list[tuple[str, str]]:
    groups: dict[str, list[str]] = {}
    for layer in result.kept:
        groups.setdefault(layer.notes[0] if layer.notes else "not quantized", []).append(layer.name)
    return [
        (reason, ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else ""))
        for reason, names in groups.items()
    ]


def _license(source: Mapping[str, Any]) -> str:
    parts = [str(source[key]) for key in ("license_name", "license", "license_link") if source.get(key)]
    return ", ".join(parts)


def _python_call(result: ConvertResult, name: str) -> str:
    output = Path(result.output).name if result.output else "OUT"
    return f"quantkit convert {name} --format {result.format} -o {output}"
