"""The structure holds: imports go one way, sizes stay readable, no check is empty."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "rankwise"

# A module may import from its own layer and from those before it.
LAYERS = (
    ("errors", "options", "storage", "cache_home"),
    ("images",),
    ("models", "data", "accounting", "reports"),
    ("method", "linalg", "onednn", "cpp", "handle", "distributed", "sharding"),
    ("layers",),
    (
        "candidates",
        "surgery",
        "closing",
        "structure",
        "updates",
        "selection",
        "ranks",
        "optim",
        "followers",
    ),
    ("methods",),
    (
        "run",
        "running_statistics",
        "beside",
        "events",
        "composition",
        "isolation",
        "checkpoint",
        "recipes",
        "training",
    ),
    ("integrations",),
    ("cli", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(SOURCE.rglob("*.py"))


def component(path: Path) -> str:
    part = path.relative_to(SOURCE).parts[0]
    return part.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Components of the package that a file imports when it runs (not for types alone)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "rankwise":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("rankwise.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    own = component(path)
    if own == "__init__":
        return
    for other in imported(path) - {"__version__"}:
        assert other in LEVEL, f"{path.name} imports {other}, which has no layer"
        assert LEVEL[other] <= LEVEL[own], f"{own} must not import {other}"


@pytest.mark.parametrize("name", ["images", "models", "data", "accounting", "reports"])
def test_leaves_know_nothing_of_low_rank(name: str) -> None:
    files = [p for p in MODULES if component(p) == name]
    assert files
    for path in files:
        assert imported(path) <= {"errors", "options", "images", name}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_size_budgets(path: Path) -> None:
    text = path.read_text()
    method = path.parent.name == "methods" and path.name != "__init__.py"
    assert text.count("\n") <= (100 if method else 400)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            body = node.body[1:] if documented and len(node.body) > 1 else node.body
            size = (node.end_lineno or 0) - body[0].lineno + 1
            assert size <= 60, f"{node.name}: {size} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_module_and_public_function_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "no module docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if any(ast.unparse(d) == "overload" for d in node.decorator_list):
                continue  # the implementation, which comes last, has it
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_no_comparison_is_thrown_away() -> None:
    """A bare `allclose(...)` statement checks nothing, and no linter says so."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                called = ast.unparse(node.value.func).rpartition(".")[2]
                assert called not in ("allclose", "array_equal", "equal", "isclose"), (
                    f"{path.name}:{node.lineno} throws its result away"
                )


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import rankwise, rankwise.cli, rankwise.images.process, sys; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_resolves() -> None:
    import rankwise

    for name in rankwise.__all__:
        assert getattr(rankwise, name) is not None
    assert set(rankwise.__all__) == set(rankwise._HOME)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = rankwise.nonsense
