"""What the suite's own modules never do, from their syntax trees: write a pickle but a checkpoint's own, read one
without torch's restrictions, run a model's or anybody's code outside of the sandbox, or hand text to a shell.

What the commands write is looked at in test_no_network.py, what hostile files do in test_hostile_files.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(f.stem for f in ROOT.glob("*.py"))

NEVER = (
    *("cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "yaml"),
    *("pickle.dump", "pickle.dumps", "pickle.load", "pickle.loads", "pickle.Pickler", "pickle.Unpickler"),
    *("torch.jit.load", "torch.jit.save", "torch.hub", "torch.package", "torch.export.load", "torch.export.save"),
    *("torch.serialization.add_safe_globals", "torch.serialization.safe_globals", "torch.serialization.load"),
    *("torch.serialization.save", "pandas.read_pickle", "numpy.save", "numpy.savez", "numpy.savez_compressed"),
    *("numpy.ndarray.dump", "numpy.lib.format", "os.system", "os.popen", "os.execv", "os.execve", "os.execvp"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn", "runpy", "code.interact", "builtins.eval"),
    *("builtins.exec", "__import__", "breakpoint"),
)
"""Names, with all that lies below them, that occur nowhere."""
ONLY_IN = {
    "pickle": {"prime_checkpoint": 1},  # pickle.UnpicklingError, which torch raises
    "pickle.UnpicklingError": {"prime_checkpoint": 1},
    "pickletools": {"prime_checkpoint": 1},
    "torch.save": {"prime_checkpoint": 1},
    "torch.load": {"prime_checkpoint": 1},
    "exec": {"code_sandbox": 1},
    "compile": {"code_sandbox": 1},
    "eval": {},
}
"""Names that occur in these modules, so often, and nowhere else."""
KEYWORDS = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
"""A keyword that a call must have, as a literal."""


def names_of(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Every dotted name that is used, as it is called where it comes from, and every module that is imported."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}", node
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner and (name := dotted(node, known)):
            yield name, node


def dotted(node: ast.AST, known: dict[str, str]) -> str:
    """``np.load`` as ``numpy.load``; nothing of what does not begin with a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([known.get(node.id, node.id), *reversed(parts)])


def faults(module: str, text: str) -> list[str]:
    """A line for each thing that a module's text does and must not."""
    tree = ast.parse(text)
    names = list(names_of(tree))
    found = [
        f"line {getattr(node, 'lineno', 0)}: {name}"
        for name, node in names
        if any(name == one or name.startswith(one + ".") for one in NEVER)
    ]
    for wanted, places in ONLY_IN.items():
        count = sum(name == wanted for name, _ in names)
        if count != places.get(module, 0):
            found.append(f"{wanted} occurs {count} times, expected {places.get(module, 0)}")
    known = {id(node): name for name, node in names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        given = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else ... for k in node.keywords}
        name = known.get(id(node.func), "")
        if name in KEYWORDS and given.get(KEYWORDS[name][0]) is not KEYWORDS[name][1]:
            found.append(f"line {node.lineno}: {name} without {KEYWORDS[name][0]}={KEYWORDS[name][1]}")
        if name.startswith("subprocess.") and (None in given or given.get("shell", False) is not False):
            found.append(f"line {node.lineno}: {name} with a shell")
        for keyword, allowed in (("trust_remote_code", False), ("allow_pickle", False), ("weights_only", True)):
            if given.get(keyword, allowed) is not allowed:
                found.append(f"line {node.lineno}: {keyword}={given[keyword]}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_pickled_trusted_or_run(module: str) -> None:
    assert faults(module, (ROOT / f"{module}.py").read_text(encoding="utf-8")) == []


BAD = [
    "import pickle\npickle.dumps({})",
    "from pickle import dump as write\nwrite({}, None)",
    "import pickle as p\np.load(None)",
    "import joblib",
    "import marshal",
    "import shelve as s",
    "def f():\n    import yaml\n    return yaml.load('')",
    "import torch\ntorch.save({}, 'x')",
    "from torch import save\nsave({}, 'x')",
    "import torch\ntorch.load('x', weights_only=True)",
    "import numpy as np\nnp.save('x', a, allow_pickle=True)",
    "import numpy as np\nnp.load('x')",
    "import numpy as np\nnp.load('x', allow_pickle=ask())",
    "model.from_pretrained('x', trust_remote_code=True)",
    "f(trust_remote_code=config.trust)",
    "eval('1')",
    "exec('1')",
    "g = eval",
    "import builtins\nbuiltins.exec('1')",
    "import subprocess\nsubprocess.run('ls', shell=True)",
    "from subprocess import Popen\nPopen('ls', shell=config.shell)",
    "import subprocess\nsubprocess.run('ls', **options)",
    "import os\nos.system('ls')",
    "from os import popen\npopen('ls')",
    "import torch\ntorch.hub.load('x', 'y')",
    "from torch.serialization import add_safe_globals\nadd_safe_globals([A])",
    "__import__('x')",
]


@pytest.mark.parametrize("text", BAD)
def test_the_scan_notices(text: str) -> None:
    assert faults("manifolds", text)


def test_the_scan_lets_pass_what_is_harmless() -> None:
    text = "import numpy as np, subprocess, re\nmodel.eval()\nre.compile('x')\nself.exec(1)\nsubprocess.run(['ls'])\n"
    assert faults("manifolds", text + "np.load('x', allow_pickle=False)\nf(trust_remote_code=False)\n") == []


def test_a_checkpoint_is_loaded_by_the_letter() -> None:
    """Once, mapped, with the literal: no variable decides whether code may run."""
    tree = ast.parse((ROOT / "prime_checkpoint.py").read_text(encoding="utf-8"))
    loads = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    assert loads == ["torch.load(path, map_location='cpu', weights_only=True, mmap=True)"]
