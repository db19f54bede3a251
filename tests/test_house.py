"""The house keeps its own rules: format, lint, types, dependencies downward, and no Ray in the core."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EDGE = {"__init__", "cli", "faults", "capacity", "pool", "runtime", "workers", "datasets", "distributed"}
CORE = sorted(path.stem for path in (ROOT / "ray_tracin").glob("*.py") if path.stem not in EDGE)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)],
    ids=" ".join,
)
def test_tools_find_nothing(command: tuple[str, ...]) -> None:
    done = _run(*command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dependencies_point_downward() -> None:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "KEPT" in done.stdout


def test_the_core_does_not_import_ray() -> None:
    modules = ", ".join(f"ray_tracin.{name}" for name in CORE)
    code = f"import sys, {modules}; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    # The same question of the edge, so that the test can fail.
    code = "import sys, ray_tracin.runtime; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def _functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_files_and_functions_stay_short_and_imports_at_the_top() -> None:
    for path in sorted((ROOT / "ray_tracin").glob("*.py")):
        assert len(path.read_text().splitlines()) <= 450, path
        for function in _functions(path):
            documented = ast.get_docstring(function) is not None
            body = function.body[1:] if documented else function.body
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= 60, f"{path.name}: {function.name} has {length} lines"
            assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(function)), function.name
