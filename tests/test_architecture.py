"""Imports point one way, and what is installed stays small at the bottom."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
# Lower number: nearer the ground. A module imports modules of a lower layer, or of its own package.
LAYERS = {
    "structured": 0,
    "config_sections": 0,
    "config": 0,
    "progress": 0,
    "data": 1,
    "models": 2,
    "integrations": 3,
    "rewards": 3,
    "rollout": 3,
    "train": 3,
    "stages": 4,
    "methods": 5,
    "evals": 6,
    "lab": 6,
    "report": 6,
    "doctor": 7,
    "cli": 8,
    "__main__": 9,
}


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports at any depth, type-checking blocks included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(ROOT / "specs_fast").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted((ROOT / "specs_fast").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_trainer_imports_downwards_only(path: Path) -> None:
    own = room(path)
    if own == "__init__":
        return
    assert own in LAYERS, f"{own} has no layer; place it in docs/architecture.md and here"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "specs_fast" or len(parts) == 1 or parts[1] == own or parts[1] not in LAYERS:
            continue
        same_floor = LAYERS[parts[1]] == LAYERS[own] == 0
        assert LAYERS[parts[1]] < LAYERS[own] or same_floor, f"{path} imports {name}, which is not below it"


def test_integrations_import_kernels_and_models_only_and_nothing_imports_them() -> None:
    for path in sorted((ROOT / "specs_fast").rglob("*.py")):
        ours = {name for name in imports(path) if name.split(".")[0] == "specs_fast" and name != "specs_fast"}
        rooms = {name.split(".")[1] for name in ours}
        if room(path) == "integrations":
            assert rooms <= {"models", "integrations"}, f"{path} imports {rooms}"
        else:
            assert "integrations" not in rooms, f"{path} imports an integration"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT / "kernels"))
)
def test_the_kernel_library_needs_only_torch(path: Path) -> None:
    allowed = {"torch", "triton", "specs_kernels"} | set(sys.stdlib_module_names)
    outside = {name.split(".")[0] for name in imports(path)} - allowed
    assert not outside, f"{path} imports {outside}"


def test_importing_the_kernel_library_does_not_import_the_trainer_or_transformers() -> None:
    code = (
        "import sys, specs_kernels; "
        "bad = [m for m in sys.modules if m.split('.')[0] in ('specs_fast', 'transformers', 'numpy.testing')]; "
        "print(bad); sys.exit(bool([m for m in bad if not m.startswith('numpy')]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_trl_extra_installs_what_the_integration_admits() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        requirements = tomllib.load(file)["project"]["optional-dependencies"]["trl"]
    (trl,) = (Requirement(text).specifier for text in requirements if Requirement(text).name == "trl")
    tree = ast.parse((ROOT / "specs_fast" / "integrations" / "trl.py").read_text(encoding="utf-8"))
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    admitted = set(ast.literal_eval(assigned["VERSIONS"]))
    every = [f"{major}.{minor}" for major in range(3) for minor in range(100)]
    assert {version for version in every if f"{version}.3" in trl} == admitted
