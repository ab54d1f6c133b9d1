"""pyproject.toml, constraints.txt and the Makefile agree with each other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import quantkit

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_version(project: dict[str, Any]) -> None:
    assert project["version"] == quantkit.__version__
    assert f"## {quantkit.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_requirement_that_setup_installs_is_pinned(
    project: dict[str, Any], pins: dict[str, str]
) -> None:
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(r for e in ("dev", "report", "onnx", "eval") for r in extras[e])]
    for text in wanted:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version, prereleases=True), f"{text}: {version} is pinned"


def test_pins_are_plain(pins: dict[str, str]) -> None:
    """No local builds, no paths, no names of hosts: the same file must do everywhere."""
    assert pins["torch"] == "2.13.0" and pins["triton"] == "3.7.1"
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins.values())
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"https?:|file:|@|/(opt|home|work)/", text)


#: Package -> the first version without the vulnerabilities that SECURITY.md lists, and one that still has them.
SAFE = {
    "torch": ("2.10.0", "2.9.1"),
    "transformers": ("5.5.0", "5.4.0"),
    "jinja2": ("3.1.6", "3.1.5"),
    "onnx": ("1.21.0", "1.20.1"),
    "pyyaml": ("5.4", "5.3.1"),
}


def test_lower_bounds_exclude_known_vulnerabilities(project: dict[str, Any], pins: dict[str, str]) -> None:
    texts = [*project["dependencies"], *(r for rs in project["optional-dependencies"].values() for r in rs)]
    seen = set()
    for requirement in map(Requirement, texts):
        name = canonicalize_name(requirement.name)
        if name in SAFE:
            seen.add(name)
            assert not requirement.specifier.contains(SAFE[name][1]), requirement
            assert Version(pins[name]) >= Version(SAFE[name][0])
    assert seen == SAFE.keys()
    policy = (ROOT / "SECURITY.md").read_text(encoding="utf-8").lower()
    assert all(f"{name} {safe}" in policy for name, (safe, _) in SAFE.items())


def test_setup_pins_torch_first(pins: dict[str, str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"-c constraints.txt torch=={pins['torch']}" in makefile
    for target in ("setup", "demo", "test", "check", "peers"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_command_is_fast_and_quiet() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", "--version"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.stdout, done.stderr) == (f"quantkit {quantkit.__version__}\n", "")
