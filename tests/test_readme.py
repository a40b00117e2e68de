"""The commands of README and BENCHMARKS parse, the file table matches the tree, pictures and links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro

ROOT = Path(__file__).resolve().parent.parent
README, BENCHMARKS = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "BENCHMARKS.md"))
CONFIGS = {
    "qwen_prime_importer": "ImportConfig",
    "qwen_prime_train": "TrainConfig",
    "verify_qwen_prime": "VerifyConfig",
    "qwen_prime_eval": "EvalConfig",
    "qwen_prime_data": "DataConfig",
    "qwen_prime_bench": "BenchConfig",
    "qwen_prime_pack": "PackScriptConfig",
    "qwen_prime_chat": "ChatConfig",
}


def commands() -> list[str]:
    """Every ``python script.py ...`` line in their code blocks, continuation lines joined."""
    found: list[str] = []
    for language, block in re.findall(r"```(\w*)\n(.*?)```", f"{README}\n{BENCHMARKS}", flags=re.DOTALL):
        if language not in ("", "bash", "sh"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split("#")[0].strip()
            if line.startswith("python "):
                found.append(line)
    return found


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str) -> None:
    _, script, *arguments = shlex.split(command)
    if script.startswith("assets/"):
        assert (ROOT / script).is_file()
        return
    module = importlib.import_module(script.removesuffix(".py"))
    if script == "monitor_qwen.py":
        # The one script whose command line is its own: tyro takes longer to import than it has to start.
        module.parse(arguments)
        return
    config: Any = getattr(module, CONFIGS[script.removesuffix(".py")])
    tyro.cli(config, args=arguments)


def test_there_are_commands_of_every_script() -> None:
    scripts = {shlex.split(c)[1].removesuffix(".py") for c in commands()}
    assert {*CONFIGS, "monitor_qwen"} <= scripts


def test_the_file_table_matches_the_tree() -> None:
    listed = set(re.findall(r"^\| `([\w.]+\.py)` \|", README, flags=re.MULTILINE))
    assert listed == {f.name for f in ROOT.glob("*.py")}


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def anchors(text: str) -> set[str]:
    """What a link to a heading says behind its #: lower case, punctuation gone, spaces to hyphens."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pictures_and_links_lead_somewhere() -> None:
    for text in (README, BENCHMARKS):
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", text):
            assert not target or (ROOT / target).exists(), target
            if anchor:
                assert anchor in anchors(BENCHMARKS if target == "BENCHMARKS.md" else text), anchor
