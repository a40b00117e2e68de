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
    "vote_units": 0,
    "cuda_compiler": 0,
    "row_threads": 0,
    "ballots": 1,
    "ghost_kernels_cpu": 1,
    "ghost_kernels_cuda": 1,
    "ghost_kernels_torch": 1,
    "prime_cli": 2,
    "text_records": 2,
    "ghost_kernels": 2,
    "prime_checkpoint": 2,
    "low_bit": 2,
    "run_reader": 2,
    "answer_masks": 3,
    "momentum_rules": 3,
    "whisper_rules": 3,
    "sliced_softmax": 3,
    "bench_kernels": 3,
    "prime_pack": 3,
    "run_folder": 3,
    "run_summary": 3,
    "step_profile": 4,
    "packed_batches": 4,
    "token_files": 4,
    "document_cache": 5,
    "vote_rules": 4,
    "ghost_grid": 4,
    "monitor_terminal": 4,
    "monitor_web": 4,
    "training_recipe": 5,
    "record_streams": 5,
    "packed_checkpoint": 5,
    "ghost_core": 5,
    "token_shards": 6,
    "quality_tasks": 6,
    "prime_patch": 6,
    "qwen_prime_wrapper": 6,
    "night_shift": 6,
    "micro_batch_graph": 6,
    "vote_casting": 7,
    "training_data": 7,
    "night_watch": 7,
    "vote_trainer": 8,
    "dense_weights": 7,
    "chat_session": 7,
    "memory_plan": 7,
    "model_checks": 7,
    "code_eval": 7,
    "low_bit_calibration": 7,
    "low_bit_healing": 9,
    "hf_export": 8,
    "gguf_export": 8,
    "core_eval": 8,
    "prime_quality": 9,
    "low_bit_packing": 10,
    "bench_models": 10,
    "prime_hf": 10,
    "quality_summary": 10,
    "quality_runs": 10,
    "training_session": 10,
    "bench_import": 11,
    "bench_memory": 11,
    "bench_training": 11,
    "bench_generation": 11,
    "bench_gpu": 11,
    "bench_growth": 11,
    "bench_quality": 11,
    "qwen_prime_importer": 11,
    "qwen_prime_train": 11,
    "verify_qwen_prime": 11,
    "qwen_prime_data": 11,
    "qwen_prime_eval": 11,
    "qwen_prime_pack": 11,
    "qwen_prime_chat": 11,
    "monitor_qwen": 11,
    "bench_saving": 12,
    "qwen_prime_bench": 13,
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
