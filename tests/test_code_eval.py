"""code_eval: HumanEval read, asked for and judged; the published verdicts of a published model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

import code_eval
from code_eval import Problem, code_of, continuation_of, judge, program_of, read_completions, read_problems
from code_sandbox import Limits
from text_records import DataError

PROBLEM = Problem(
    "T/0",
    'def twice(x):\n    """ Twice x. """\n',
    "twice",
    "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    "    return 2 * x\n",
)


def test_verdicts_of_the_authors_own_solutions_and_of_a_published_model(shared_data: Path) -> None:
    """164 of 164, and 72 of 164 verdict by verdict."""
    problems = read_problems(shared_data / "code/HumanEval.jsonl.gz")
    assert len(problems) == 164
    own = judge(problems[::4], {p.task_id: p.solution for p in problems}, limits=Limits(15.0), jobs=2)
    assert [v.task_id for v in own if not v.passed] == []
    folder = shared_data / "reference/qwen2.5-coder-1.5b-base"
    completions = read_completions(folder / "humaneval_generated.jsonl", problems)
    found = judge(problems, completions, limits=Limits(15.0), jobs=2)
    published = json.loads((folder / "humaneval_generated_eval_results.json").read_text())["eval"]
    wrong = [v for v in found if v.passed != (published[v.task_id][0]["base_status"] == "pass")]
    assert wrong == [] and sum(v.passed for v in found) == 72


@pytest.mark.parametrize(
    ("completion", "passed"),
    [
        ("    return 2 * x\n", True),
        ("\ndef twice(x):\n    return x + x\n", True),
        ("    return x\n", False),
        ("    pass\n", False),
        ("    return (\n", False),
        ("", False),
        ("    import os\n    os._exit(0)\n", False),
        ("    while True: pass\n", False),
    ],
)
def test_judging(completion: str, passed: bool) -> None:
    (verdict,) = judge([PROBLEM], {"T/0": completion}, limits=Limits(1.0))
    assert (verdict.task_id, verdict.passed) == ("T/0", passed)
    assert bool(verdict.reason) is not passed


def test_a_completion_that_is_no_text_fails() -> None:
    (verdict,) = judge([PROBLEM], {"T/0": "    x = '\ud800'\n    return 2 * x\n"}, limits=Limits(5.0))
    assert not verdict.passed and verdict.reason


def test_code_is_taken_out_of_answers() -> None:
    whole = "def twice(x):\n    return 2 * x"
    assert code_of(PROBLEM, f"Sure!\n```python\n{whole}\n```\nDone.") == whole
    longer = "print(1)\nprint(2)\nprint(3)  # longer than the function"
    assert code_of(PROBLEM, f"```\n{longer}\n```\n```py\n{whole}\n```") == whole
    assert code_of(PROBLEM, f"```python\n{whole}") == whole, "an answer that ran out of tokens"
    assert code_of(PROBLEM, whole) == whole
    assert code_of(PROBLEM, "```python\nother = 1\n```") == "other = 1"


@pytest.mark.parametrize(
    "answer",
    [
        "```python3\n{0}\n```\nThis doubles.",
        "```PYTHON\n{0}\n```",
        '```python title="a.py"\n{0}\n```',
        "Sure: ```python\n{0}\n```",
        "Not ```x = 1```\n\n```python\n{0}\n```\nbut this.",
        "<think>\n```python\ndef twice(x):\n    return x\n```\nis wrong.\n</think>\n\n```python\n{0}\n```",
        "```python\n{0}\n```\n<think>\nAgain:\n```python\ndef twice(x):\n    return x",
        "```python\ndef twice(x): ...\n```\nIn full:\n```python\n{0}\n```\nTry it:\n```python\nprint(twice(1))\n```",
    ],
)
def test_code_is_taken_out_of_fences_of_many_kinds(answer: str) -> None:
    whole = "def twice(x):\n    return 2 * x"
    assert code_of(PROBLEM, answer.format(whole)) == whole
    assert code_of(PROBLEM, answer.format(whole).replace("\n", "\r\n")) == whole
    assert code_of(PROBLEM, "<think>\nOn and on") == ""


def test_code_is_moved_to_the_margin() -> None:
    block = '   ```python\n   def twice(x):\n       """\nleft\n       """\n       return 2 * x\n   ```\n'
    assert code_of(PROBLEM, f"1. So:\n\n{block}") == 'def twice(x):\n    """\nleft\n    """\n    return 2 * x'
    assert code_of(PROBLEM, "```python\n    return 2 * x\n```") == "    return 2 * x", "the rest of a function"


def test_a_continuation_ends_with_its_function() -> None:
    body = "    if x:\n        return [\n        1,\n]\n# note\n\n    return 2 * x\n"
    for rest in ("print(twice(3))\n", "def other():\n    pass\n", "class A:\n", "if __name__ == '__main__':\n"):
        assert continuation_of(body + "\n" + rest).rstrip("\n") == body.rstrip("\n")
    assert continuation_of("    return 1\nprint(2)") == "    return 1"
    assert continuation_of("    return 1\n\n\nassert 1") == "    return 1\n\n"
    assert "return 2 * x" in continuation_of(body + "\nprint()")


def test_files(tmp_path: Path) -> None:
    line = {"task_id": "a", "prompt": "def f():\n", "entry_point": "f", "test": "def check(c): pass"}
    plain, packed = tmp_path / "p.jsonl", tmp_path / "p.jsonl.gz"
    plain.write_text(json.dumps(line) + "\n\n" + json.dumps({**line, "task_id": "b"}) + "\n")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_problems(plain) == read_problems(packed) and len(read_problems(plain)) == 2
    answers = tmp_path / "c.jsonl"
    answers.write_text('{"task_id": "a", "completion": "x"}\n')
    with pytest.raises(DataError, match="no completion of b"):
        read_completions(answers, read_problems(plain))

    def refused(content: bytes, message: str) -> None:
        plain.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_problems(plain)

    refused(b"", "has no problem")
    refused(b"[1]\n", "expected an object")
    refused(b"{\n", "p.jsonl:1: malformed JSON")
    refused(json.dumps({**line, "entry_point": "f();import os"}).encode(), "a name")
    refused(json.dumps({k: v for k, v in line.items() if k != "test"}).encode(), "lacks one of")
    refused(packed.read_bytes()[:-9], "cannot read")
    refused(b"\xff\xfe", "cannot read")
    answers.write_text('{"task_id": 1, "completion": "x"}\n')
    with pytest.raises(DataError, match="lacks task_id"):
        read_completions(answers, [])


def test_separators_inside_a_string_end_no_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "one\u2028two\u0085three"}\r\n\n{"a": 2}\n', encoding="utf-8")
    assert code_eval.read_lines_of(path) == [{"a": "one\u2028two\u0085three"}, {"a": 2}]


def test_programs_hold_prompt_completion_and_test() -> None:
    program = program_of(PROBLEM, PROBLEM.solution)
    places = [program.index(part) for part in ("def twice", "return 2", "def check", "check(twice)")]
    assert places == sorted(places)


@pytest.mark.parametrize("chat", [True, False])
def test_completing_asks_in_the_form_that_the_tokenizer_knows(chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Tokenizer:
        chat_template = "x" if chat else None

        def apply_chat_template(self, turns: Any, **options: Any) -> str:
            assert options == {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
            return "<user>" + turns[0]["content"] + "<assistant>"

        def __call__(self, text: str, **options: Any) -> Any:
            asked.append(text)
            return {"input_ids": [1]}

    answer = "Here:\n```python\ndef twice(x):\n    return x * 2\n```" if chat else "    return x * 2\n\nprint(1)"
    monkeypatch.setattr(code_eval, "continue_texts", lambda *a: [answer])
    completions = code_eval.complete(None, Tokenizer(), [PROBLEM], tokens=9, batch_size=1)  # type: ignore[arg-type]
    if chat:
        assert "```python\ndef twice(x):" in asked[0]
    else:
        assert asked == [PROBLEM.prompt]
    assert judge([PROBLEM], completions, limits=Limits(5.0))[0].passed
