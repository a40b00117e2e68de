"""The house: imports go strictly downward, a script never imports a script, nothing runs at import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = {
    "manifolds": 0,
    "prime_telemetry": 0,
    "prime_cli": 0,
    "prime_device": 0,
    "entropy_coding": 0,
    "qwen_prime_data": 0,
    "ghost_kernels": 1,
    "prime_checkpoint": 1,
    "prime_pack": 2,
    "low_bit": 1,
    "packed_checkpoint": 4,
    "prime_patch": 5,
    "vote_rules": 2,
    "ghost_core": 3,
    "qwen_prime_wrapper": 5,
    "run_folder": 2,
    "night_shift": 5,
    "low_bit_calibration": 6,
    "vote_trainer": 6,
    "memory_plan": 6,
    "low_bit_healing": 7,
    "prime_quality": 7,
    "qwen_prime_importer": 8,
    "qwen_prime_train": 8,
    "verify_qwen_prime": 8,
    "qwen_prime_pack": 8,
    "qwen_prime_eval": 8,
    "qwen_prime_bench": 8,
}


def imports_of(module: str) -> set[str]:
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found & set(FLOORS)


def test_every_module_has_a_floor() -> None:
    assert {f.stem for f in ROOT.glob("*.py")} == set(FLOORS)


@pytest.mark.parametrize("module", sorted(FLOORS))
def test_imports_go_down(module: str) -> None:
    for other in imports_of(module):
        assert FLOORS[other] < FLOORS[module], f"{module} imports {other}"


@pytest.mark.parametrize("module", sorted(FLOORS))
def test_nothing_runs_at_import(module: str) -> None:
    """At the top level: definitions, imports, assignments, guards and docstrings; no bare calls but registrations."""
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If, ast.Assert)
    for node in tree.body:
        if isinstance(node, ast.Expr):
            text = ast.unparse(node)
            assert isinstance(node.value, ast.Constant) or text.startswith("os.register_at_fork"), text
        else:
            assert isinstance(node, allowed), ast.unparse(node)
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")


def test_telemetry_needs_no_torch() -> None:
    tree = ast.parse((ROOT / "prime_telemetry.py").read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert not any(name.startswith(("torch", "transformers", "numpy")) for name in names)
