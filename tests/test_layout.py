"""The house: a room imports only rooms above it, and the file that travels imports nothing of ours."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ddgen"
ORDER = ["data", "autoencoder", "diffusion", "observer", "distill", "evaluation", "page"]
SHARED = {
    "config", "seeds", "errors", "checkpoint", "precision", "grids", "hardware", "memory", "resume", "sharding",
    "stopping", "timing", "units", "together",
}  # fmt: skip
TOP = {"commands", "cli", "launch", "__main__"}
FORBIDDEN = {("observer", "diffusion"), ("observer", "autoencoder")}

TRAVELLERS = [
    *("diffusion/pipeline.py", "diffusion/samplers.py", "diffusion/guidance.py"),
    *("autoencoder/patch_autoencoder.py", "autoencoder/identity_autoencoder.py"),
]


def imports(path: Path) -> set[str]:
    """Names of our own modules, as room or top-level module, that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if f"{path.parent.name}/{path.name}" in TRAVELLERS and node.level == 1:
                assert f"{path.parent.name}/{node.module}.py" in TRAVELLERS, f"{path}: {node.module} does not travel"
                continue
            assert node.level == 0, f"{path}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "ddgen"
                else [str(node.module)]
            )
        found |= {name.split(".")[1] for name in names if name.startswith("ddgen.")}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_flow_downwards(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    used = imports(path) - {"__version__"}
    if room in TOP or room == "__init__":
        return
    if room in SHARED:
        assert used <= SHARED, f"{path.name} is shared, so it may not import {used - SHARED}"
        return
    allowed = SHARED | set(ORDER[: ORDER.index(room) + 1])
    assert used <= allowed, f"{room} is above {used - allowed}"
    assert not {(room, other) for other in used} & FORBIDDEN


@pytest.mark.parametrize("name", TRAVELLERS)
def test_files_that_travel_with_the_weights_import_nothing_of_ours(name: str) -> None:
    assert imports(PACKAGE / name) == set()
