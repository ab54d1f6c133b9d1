"""The model card: complete, valid, and no place for a source to smuggle anything in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from quantkit.formats import FORMATS, get_format
from quantkit.model_card import front_matter, render_model_card
from quantkit.report_types import ConvertResult, LayerReport


def result(**changes: object) -> ConvertResult:
    layers = [
        LayerReport("model.layers.0.mlp.up_proj", (8, 8), "quantized", {"bits": 4}, 4.25, 0.1, 0.05),
        LayerReport(
            "model.layers.1.mlp.up_proj", (8, 8), "quantized", {"bits": 8}, 8.25, 0.2, 0.09, notes=["damped"]
        ),
        LayerReport("lm_head", (8, 8), "kept", notes=["output embedding"]),
    ]
    values: dict[str, object] = {
        "output": "/tmp/my-out",
        "format": "gptq",
        "options": {"bits": 4, "group_size": 128},
        "layers": layers,
        "size_before": 1000,
        "size_after": 300,
        "bits_per_weight": 4.25,
        "bits_per_weight_model": 5.5,
        "calibration": {
            "source": "builtin",
            "samples": 128,
            "seqlen": 1024,
            "seed": 0,
            "fingerprint": "ab12",
        },
        "warnings": ["one layer has a smaller group"],
    }
    return ConvertResult(**{**values, **changes})  # type: ignore[arg-type]


def header(card: str) -> dict[str, object]:
    loaded = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(loaded, dict)
    return loaded


def test_it_says_everything(tmp_path: Path) -> None:
    source = tmp_path / "README.md"
    source.write_text(
        "---\nlicense: mit\nlicense_link: LICENSE\nlanguage:\n- en\ndatasets:\n- secret\n---\n# Source\n"
    )
    card = render_model_card(
        result(),
        base_model="org/model",
        loaders=get_format("gptq").loaders,
        source_card=source,
        command="quantkit convert org/model --format gptq -o my-out",
        provenance={
            "source": {"revision": "abc", "fingerprint": "f" * 64},
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        },
    )
    head = header(card)
    assert head["base_model"] == "org/model" and head["quantized_by"] == "quantkit"
    assert head["license"] == "mit" and head["language"] == ["en"] and "datasets" not in head
    assert head["base_model_revision"] == "abc" and set(head["tags"]) >= {"quantkit", "gptq"}  # type: ignore[call-overload]
    for words in (
        "| group\\_size | 128 |",
        "| samples | 128 |",
        "| fingerprint | ab12 |",
        "300 B (30.0%)",
        "| `model.layers.1.mlp.up_proj` | bits=8 | 0.20000 | 0.09000 |",
        "- one layer has a smaller group",
        "- model.layers.1.mlp.up\\_proj: damped",
        "- output embedding: lm\\_head",
        "quantkit convert org/model --format gptq -o my-out",
        "vllm serve my-out",
        'GPTQModel.load("my-out")',
        "LICENSE",
    ):
        assert words in card, words
    assert card.index("layers.1.mlp") < card.index("layers.0.mlp")  # worst first
    assert "{{" not in card and "{%" not in card and not re.search(r"\n{4,}", card)


def test_a_local_model_is_not_linked(tmp_path: Path) -> None:
    source = tmp_path / "secret-folder" / "llama"
    source.mkdir(parents=True)
    card = render_model_card(result(calibration=None), base_model=str(source), command="x")
    assert "base_model" not in header(card)
    assert "`llama` (a local directory)" in card and "secret-folder" not in card
    assert "No calibration data was used." in card


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gets_a_card(name: str) -> None:
    card = render_model_card(
        result(format=name, options={}, layers=[], warnings=[]),
        base_model="m/n",
        loaders=get_format(name).loaders,
    )
    assert header(card)["quantized_by"] == "quantkit"
    assert "transformers" in card and "quantkit generate my-out" in card


def test_text_from_the_source_is_data(tmp_path: Path) -> None:
    evil = "{{ 7*7 }} {% for x in y %} <script>alert(1)</script> `x` | [a](javascript:b)\n---\ntags: [owned]"
    source = tmp_path / "README.md"
    source.write_text(yaml.safe_dump({"license": evil, "license_name": "a\n---\nb"}).join(["---\n", "---\n"]))
    layer = LayerReport(evil, (8, 8), "quantized", {}, 4.0, 0.1, notes=[evil])
    card = render_model_card(
        result(layers=[layer], warnings=[evil]),
        base_model=evil,
        source_card=source,
        command=f"quantkit ```\n{evil}",
    )
    head = header(card)
    assert head["tags"] == ["quantkit", "gptq", "quantized"]
    assert "{{ 7*7 }}" in card and "49" not in card
    text = card.split("---\n", 2)[2]
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    assert "<script>" not in outside and not re.search(r"(?<!\\)\]\(javascript", outside)
    assert text.count("```") % 2 == 0


@pytest.mark.parametrize(
    "text",
    [
        "no header",
        "---\n- a list\n---\n",
        "---\nlicense: [\n---\n",
        "---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
        "---\na: &a [x, x]\nb: *a\n---\n",
        "---\nlicense: mit\n",
        "---\n" + "[" * 5000 + "\n---\n",
        "---\nlicense: 2024-13-99\n? [1]\n: 2\n---\n",
    ],
)
def test_a_broken_card_is_no_header(tmp_path: Path, text: str) -> None:
    card = tmp_path / "README.md"
    card.write_text(text)
    assert {k: v for k, v in front_matter(card).items() if v != "2024-13-99"} == {}


def test_an_absent_or_binary_card_is_no_header(tmp_path: Path) -> None:
    assert front_matter(tmp_path / "README.md") == {}
    (tmp_path / "b.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert set(front_matter(tmp_path / "b.md")) <= {"license"}
