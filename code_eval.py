"""HumanEval, and any file of its form: prompts to functions, functions to verdicts.

A problem is a prompt (signature and docstring), the name of the function, and a test. What a model writes becomes a
program: the prompt, the function, the test, a call of it. A program passes if it runs to its end in ``code_sandbox``.

Two ways of asking, by what the tokenizer has: with a chat template the model is asked for the whole function and the
code block of its answer is taken; without one it continues the prompt, and the text is cut where the function ends.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from code_sandbox import Limits, Outcome, run_program
from qwen_prime_wrapper import continue_texts
from text_records import DataError

REQUEST = (
    "Complete the following Python function. Answer with one code block that holds the whole function, with its "
    "imports.\n\n```python\n{prompt}\n```"
)
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_FENCE = re.compile(r"^[^`\n]*```[^`\n]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_ENDS = re.compile(r"\n(?=\S)(?!(?:#|\)|\]|\}))")
"""The first line that is not indented, comments and closing brackets aside, ends a continued function."""


@dataclass(frozen=True)
class Problem:
    """One problem; ``solution`` is the author's own continuation of the prompt."""

    task_id: str
    prompt: str
    entry_point: str
    test: str
    solution: str


@dataclass(frozen=True)
class Verdict:
    """What became of one completion."""

    task_id: str
    passed: bool
    reason: str


_LINES_MAX = 1 << 27


def read_lines_of(path: Path) -> list[dict[str, object]]:
    """The objects of a .jsonl file, gzipped or not.

    Raises:
        DataError: with file and line.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            # A few kilobytes of gzip may be gigabytes.
            with gzip.open(path) as file:
                raw = file.read(_LINES_MAX + 1)
            if len(raw) > _LINES_MAX:
                raise DataError(
                    f"{path} unpacks to more than {_LINES_MAX:,} bytes: too many for problems or completions"
                )
        text = raw.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    found = []
    # Not splitlines: JSON may hold separators that it takes for ends of lines.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: malformed JSON: {error}") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: got {type(value).__name__}, expected an object")
        found.append(value)
    return found


def read_problems(path: Path) -> list[Problem]:
    """Problems of a file in HumanEval's form.

    Raises:
        DataError: a line that is none, or no line at all.
    """
    problems = []
    for number, line in enumerate(read_lines_of(path), 1):
        keys = ("task_id", "prompt", "entry_point", "test")
        values = [line.get(key) for key in keys]
        if not all(isinstance(v, str) for v in values) or not str(line["entry_point"]).isidentifier():
            raise DataError(f"{path}: problem {number} lacks one of {', '.join(keys)} (strings, a name)")
        task, prompt, name, test = map(str, values)
        problems.append(Problem(task, prompt, name, test, str(line.get("canonical_solution", ""))))
    if not problems:
        raise DataError(f"{path} has no problem")
    return problems


def read_completions(path: Path, problems: Iterable[Problem]) -> dict[str, str]:
    """Completions of a file of ``task_id`` and ``completion``, one of each problem.

    Raises:
        DataError: a problem without one, or a line that is none.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(read_lines_of(path), 1):
        task, text = line.get("task_id"), line.get("completion")
        if not isinstance(task, str) or not isinstance(text, str):
            raise DataError(f"{path}: line {number} lacks task_id or completion (strings)")
        found[task] = text
    if missing := [p.task_id for p in problems if p.task_id not in found]:
        raise DataError(f"{path} has no completion of {missing[0]} (and {len(missing) - 1} more)")
    return found


def program_of(problem: Problem, completion: str) -> str:
    """The program that decides on a completion, be it the rest of the function or the whole of it."""
    return f"{problem.prompt}{completion}\n{problem.test}\n\ncheck({problem.entry_point})\n"


def code_of(problem: Problem, answer: str) -> str:
    """The code in a chat answer, thoughts aside: the last block that defines the function, moved to the margin, else
    the longest, else all of the answer."""
    answer = _THOUGHT.sub("", answer.replace("\r\n", "\n"))
    blocks: list[str] = _FENCE.findall(answer)
    for block in reversed(blocks):
        if re.search(rf"^\s*def {problem.entry_point}\b", block, re.MULTILINE):
            # Not dedent: a string's lines may begin left of the code.
            margin = re.match(r"(?:[ \t]*\n)*([ \t]*)", block)
            return re.sub(rf"^{margin[1]}", "", block, flags=re.MULTILINE) if margin else block
    return max(blocks, key=len) if blocks else answer


def continuation_of(text: str) -> str:
    """The rest of a function at the beginning of a text that goes on behind it."""
    return _ENDS.split(text, maxsplit=1)[0]


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    tokens: int,
    batch_size: int,
) -> dict[str, str]:
    """Completions of the problems, greedily, in the form that suits the tokenizer."""
    chat = tokenizer.chat_template is not None
    prompts: list[list[int]] = []
    for problem in problems:
        text = problem.prompt
        if chat:
            turn = [{"role": "user", "content": REQUEST.format(prompt=problem.prompt.strip("\n"))}]
            # Where a template can do without a thought (Qwen3), it should: the tokens are for the function.
            text = str(
                tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)
            )
        prompts.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
    texts = continue_texts(model, tokenizer, prompts, tokens, batch_size, "write code")
    # A whole function begins on a line of its own, behind a prompt that is a function with a docstring.
    form = (lambda p, t: "\n" + code_of(p, t)) if chat else (lambda p, t: continuation_of(t))
    return {p.task_id: form(p, t) for p, t in zip(problems, texts, strict=True)}


def judge(
    problems: Sequence[Problem], completions: Mapping[str, str], *, limits: Limits, jobs: int = 1
) -> list[Verdict]:
    """Run every completion against its problem's test, so many at a time.

    Raises:
        SandboxError: programs cannot be contained on this machine.
    """
    programs = [program_of(p, completions[p.task_id]) for p in problems]
    with ThreadPoolExecutor(jobs, "judge") as pool:
        outcomes: list[Outcome] = list(
            tqdm(
                pool.map(lambda program: run_program(program, limits), programs),
                total=len(programs),
                desc="judge",
                leave=False,
                disable=None,
            )
        )
    return [Verdict(p.task_id, o.passed, o.reason) for p, o in zip(problems, outcomes, strict=True)]
