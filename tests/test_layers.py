"""The house: imports go strictly downward, a script never imports a script, nothing runs at import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = {
    "manifolds": 0,
    "prime_telemetry": 0,
    "bench_tools": 0,
    "prime_device": 0,
    "whole_output": 0,
    "modeling_prime": 0,
    "entropy_coding": 0,
    "code_sandbox": 0,
    "harmless_text": 0,
    "vote_guard": 0,
    "packed_attention": 0,
    "vote_evidence": 0,
    "prime_cli": 1,
    "text_records": 1,
    "ghost_kernels": 1,
    "prime_checkpoint": 1,
    "low_bit": 1,
    "run_reader": 1,
    "answer_masks": 2,
    "vote_rules": 2,
    "sliced_softmax": 2,
    "bench_kernels": 2,
    "prime_pack": 2,
    "run_folder": 2,
    "run_summary": 2,
    "step_profile": 3,
    "packed_batches": 3,
    "token_files": 3,
    "ghost_core": 3,
    "monitor_terminal": 3,
    "monitor_web": 3,
    "record_streams": 4,
    "packed_checkpoint": 4,
    "token_shards": 5,
    "prime_patch": 5,
    "qwen_prime_wrapper": 5,
    "night_shift": 5,
    "training_data": 6,
    "vote_trainer": 6,
    "dense_weights": 6,
    "chat_session": 6,
    "memory_plan": 6,
    "model_checks": 6,
    "code_eval": 6,
    "low_bit_calibration": 6,
    "low_bit_healing": 7,
    "hf_export": 7,
    "gguf_export": 7,
    "core_eval": 7,
    "prime_quality": 7,
    "low_bit_packing": 8,
    "bench_models": 8,
    "bench_quality": 8,
    "prime_hf": 8,
    "bench_import": 9,
    "bench_memory": 9,
    "bench_training": 9,
    "bench_generation": 9,
    "bench_growth": 9,
    "qwen_prime_importer": 9,
    "qwen_prime_train": 9,
    "verify_qwen_prime": 9,
    "qwen_prime_data": 9,
    "qwen_prime_eval": 9,
    "qwen_prime_pack": 9,
    "qwen_prime_chat": 9,
    "monitor_qwen": 9,
    "bench_saving": 10,
    "qwen_prime_bench": 11,
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


REGISTRATIONS = ("os.register_at_fork(", "AttentionInterface.register(", "AttentionMaskInterface.register(")


@pytest.mark.parametrize("module", sorted(FLOORS))
def test_nothing_runs_at_import(module: str) -> None:
    """At the top level: definitions, imports, assignments, guards and docstrings; no bare calls but registrations."""
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If, ast.Assert)
    for node in tree.body:
        if isinstance(node, ast.Expr):
            text = ast.unparse(node)
            assert isinstance(node.value, ast.Constant) or text.startswith(REGISTRATIONS), text
        else:
            assert isinstance(node, allowed), ast.unparse(node)
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")


LIGHT = [
    "harmless_text",
    "prime_telemetry",
    "run_reader",
    "run_summary",
    "monitor_terminal",
    "monitor_web",
    "monitor_qwen",
]


@pytest.mark.parametrize("module", LIGHT)
def test_who_watches_needs_no_torch(module: str) -> None:
    assert imports_of(module) <= set(LIGHT)
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert not any(name.startswith(("torch", "transformers", "numpy")) for name in names)
