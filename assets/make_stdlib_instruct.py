"""Make ``assets/stdlib_instruct.jsonl``: instruction/answer pairs from the Python standard library.

Method. Every function and method with a docstring is cut out of its file by the positions ``ast`` gives and moved
to the left margin: the opening of the docstring becomes the request, the header the input, the whole
function the answer. A record is kept only if the cut-out text still parses to the function it came from, has a body
that does something, and is unique. Which half a record falls into is decided by its file alone, with the rule the
pretraining uses, so no evaluation record comes from a file the model has read; of equal records in both halves the
training one stays.

Rejected: ``ast.unparse``, which needs no care with indentation but loses comments and the author's layout;
``inspect.getsource`` over imported modules, which would run the library's code and miss what the platform lacks;
writing requests with a language model, which would make the set depend on a model and its licence.

Files that carry copyright terms of their own, other than the Python Software Foundation's, give no records: one
licence covers the set, and its notice is written beside it.

    python assets/make_stdlib_instruct.py

No randomness: the same library gives the same bytes. Another Python version gives another set.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import platform
import re
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stdlib_source import SourceFile, iter_library, library_root

HERE = Path(__file__).resolve().parent
OUTPUT_LENGTH = range(60, 1801)
DOCSTRING_MINIMUM = 15
REQUEST_MINIMUM = 30
REQUEST_MAXIMUM = 400
# Docstrings that would ask for nothing in particular.
_EMPTY_PHRASES = {"Internal function.", "Override base method."}

Function = ast.FunctionDef | ast.AsyncFunctionDef

# A file with terms of its own: a grant in the usual wordings, or a copyright line that does not name the PSF.
_OWN_TERMS = re.compile(r"permission (to use|is (hereby )?granted)|redistribution and use in source", re.IGNORECASE)
_COPYRIGHT = re.compile(
    r"^.*(?:\bcopyright:? +(?:\(c\)|[0-9]{4}|by\b)|\(c\) +copyright\b).*$", re.IGNORECASE | re.MULTILINE
)
_CONTRIBUTED = re.compile(r"licensed to (the )?PSF under a contributor agreement", re.IGNORECASE)

_PARAGRAPH_END = re.compile(r"\n[ \t]*\n")
_SENTENCE_END = re.compile(r"(?<!\.[eg])[.!?](?=\s)")  # not after "i.e." and "e.g."
# A line that must stay a line: indented, an item of a list, a doctest, a reST directive or field.
_LAYOUT = re.compile(r"^(\s|[-*+] |>>> |\.\. |[:@]\w+ )", re.MULTILINE)

_AGREEMENT = re.compile(
    r"^PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2\n-+\n.*?(?=\s*(?:^[^\n]+\n-{5,}$|^```|\Z))",
    re.DOTALL | re.MULTILINE,
)
_COPYRIGHT_NOTICE = re.compile(r"Copyright \(c\) 2001[^\"]*?All Rights Reserved")


@dataclass(frozen=True)
class Definition:
    """A function of a module (``owner`` empty) or of a class (``owner`` its dotted name)."""

    node: Function
    owner: str

    @property
    def qualname(self) -> str:
        return f"{self.owner}.{self.node.name}" if self.owner else self.node.name


def has_own_terms(text: str) -> bool:
    """True if the file is, or may be, under terms other than the PSF's agreement."""
    if _OWN_TERMS.search(text):
        return True
    owners = [line for line in _COPYRIGHT.findall(text) if "Python Software Foundation" not in line]
    return bool(owners) and not _CONTRIBUTED.search(text)


def definitions(body: list[ast.stmt], owner: str = "") -> Iterator[Definition]:
    """Functions of a module and of its classes, also those under ``if``, ``try`` and the like.

    What is defined inside a function is left out: it leans on names around it that the record would not show.
    """
    for node in body:
        if isinstance(node, Function):
            yield Definition(node, owner)
        elif isinstance(node, ast.ClassDef):
            yield from definitions(node.body, f"{owner}.{node.name}" if owner else node.name)
        else:
            for block in ("body", "handlers", "orelse", "finalbody"):
                for inner in getattr(node, block, []):
                    yield from definitions(inner.body if isinstance(inner, ast.ExceptHandler) else [inner], owner)


def is_trivial(statement: ast.stmt) -> bool:
    """True for a bare constant, ``pass``, ``return`` of nothing or a constant, ``raise NotImplementedError``."""
    match statement:
        case ast.Pass() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Return(value=None | ast.Constant() | ast.Name(id="NotImplemented")):
            return True
        case ast.Raise(exc=ast.Name(id="NotImplementedError") | ast.Call(func=ast.Name(id="NotImplementedError"))):
            return True
    return False


def dedented(lines: list[str], node: Function) -> str | None:
    """Source of ``node`` at the left margin, or None where that is impossible without changing what it says."""
    margin = " " * node.col_offset
    cut = []
    for line in lines[node.lineno - 1 : node.end_lineno]:
        if line.strip() and not line.startswith(margin):
            return None
        cut.append(line.removeprefix(margin).rstrip())
    source = "\n".join(cut).strip()
    try:
        moved = ast.parse(source).body
    except SyntaxError:
        return None
    # Strings over several lines move with the code: harmless in the docstring, a change of value elsewhere.
    if len(moved) != 1 or _without_docstring(moved[0]) != _without_docstring(node):
        return None
    return source


def _without_docstring(node: ast.AST) -> list[str] | None:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    body = [ast.dump(statement) for statement in node.body[1:]]
    return [ast.dump(node.args), *body]


def header(source: str) -> str:
    """The ``def`` statement of ``source`` up to and including its colon, which may be lines below."""
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.OP:
            if token.string in "([{":
                depth += 1
            elif token.string in ")]}":
                depth -= 1
            elif token.string == ":" and depth == 0:
                row, column = token.end
                lines = source.split("\n")[:row]
                return "\n".join([*lines[:-1], lines[-1][:column]])
    raise ValueError(f"no function header in {source[:60]!r}")


def opening(docstring: str) -> str:
    """First paragraph of a cleaned docstring, with what follows where that says little or only announces a list.

    Rejoined into one line unless it has a layout; cut at a sentence or else at a word.
    """
    paragraphs = [_rejoined(p) for p in _PARAGRAPH_END.split(docstring.strip())]
    text = paragraphs[0]
    for paragraph in paragraphs[1:]:
        if len(text) >= REQUEST_MINIMUM and not text.endswith(":"):
            break
        text = f"{text}\n\n{paragraph}"
    if len(text) <= REQUEST_MAXIMUM:
        return text
    head = text[:REQUEST_MAXIMUM]
    ends = [m.end() for m in _SENTENCE_END.finditer(head)]
    return head[: ends[-1]] if ends else head.rsplit(maxsplit=1)[0] + " ..."


def _rejoined(paragraph: str) -> str:
    lines = [line.rstrip() for line in paragraph.split("\n")]
    return "\n".join(lines) if _LAYOUT.search(paragraph) else " ".join(" ".join(lines).split())


def request(definition: Definition, docstring: str) -> str:
    name = definition.node.name
    what = f"method `{name}` of class `{definition.owner}`" if definition.owner else f"function `{name}`"
    return f"Write the Python {what}: {opening(docstring)}"


def is_plain(text: str) -> bool:
    """True if every character prints, line feed and tab aside."""
    return all(c in "\n\t" or c.isprintable() for c in text)


def records(file: SourceFile) -> Iterator[dict[str, str]]:
    """Records of one file in source order, not yet checked for duplicates."""
    try:
        tree = ast.parse(file.text)
    except (SyntaxError, ValueError):
        return
    # Only line feeds end a line for ``ast``; str.splitlines would also split at form feeds.
    lines = file.text.split("\n")
    for definition in definitions(tree.body):
        node = definition.node
        docstring = ast.get_docstring(node)
        if not docstring or len(docstring) < DOCSTRING_MINIMUM or docstring.startswith(">>>"):
            continue
        if docstring.strip() in _EMPTY_PHRASES:
            continue
        if all(is_trivial(statement) for statement in node.body[1:]):
            continue
        source = dedented(lines, node)
        if source is None or len(source) not in OUTPUT_LENGTH:
            continue
        record = {
            "instruction": request(definition, docstring),
            "input": header(source),
            "output": source,
            "split": "eval" if file.held_out else "train",
            "source": f"{file.path}:{definition.qualname}",
        }
        if all(map(is_plain, record.values())):
            yield record


def collect(files: list[SourceFile]) -> list[dict[str, str]]:
    """Unique records of all files: the training half, then the evaluation half, each by path and line."""
    kept: list[dict[str, str]] = []
    outputs: set[str] = set()
    questions: set[tuple[str, str]] = set()
    # Training files first: of equal records the one the model may have read is the one that stays.
    for file in sorted(files, key=lambda f: f.held_out):
        if has_own_terms(file.text):
            continue
        for record in records(file):
            question = record["instruction"], record["input"]
            if record["output"] not in outputs and question not in questions:
                outputs.add(record["output"])
                questions.add(question)
                kept.append(record)
    return kept


def notice() -> str:
    """Licence notice of the records, with the agreement as the interpreter's installation has it.

    Some distributions install no ``LICENSE.txt``; there the agreement is taken from the notice in this folder.
    """
    for source in (library_root() / "LICENSE.txt", HERE / "stdlib_instruct.LICENSE.md"):
        agreement = _AGREEMENT.search(source.read_text(encoding="utf-8")) if source.exists() else None
        if agreement:
            break
    else:
        raise SystemExit("the PSF licence agreement was found neither beside the standard library nor in this folder")
    copyright_notice = _COPYRIGHT_NOTICE.search(agreement[0])
    if not copyright_notice:
        raise SystemExit(f"no copyright notice in {source}")
    return f"""\
# Licence of stdlib_instruct.jsonl

The records are excerpts of the standard library of CPython {platform.python_version()}.

{" ".join(copyright_notice[0].split())}

They are distributed under the PSF License Agreement, whose text is below.

Changes made to Python: single functions and methods with their docstrings were extracted from the library's
modules; decorators were left out; the text was moved to the left margin and trailing white space removed; the
function's header was copied into `input`, the opening of its docstring into `instruction`, with line breaks removed
and cut where it is long. Each record's `source` names the module and the function.

Files of the library that carry copyright terms of another holder gave no records, unless they say that they are
licensed to the PSF under a Contributor Agreement.

```text
{agreement[0]}
```
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE / "stdlib_instruct.jsonl")
    args = parser.parse_args()
    licence = notice()
    with warnings.catch_warnings():
        # The library keeps some dubious escapes on purpose; parsing them is no news.
        warnings.simplefilter("ignore")
        kept = collect(list(iter_library()))
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
    args.output.write_text(text, encoding="utf-8", newline="\n")
    args.output.with_suffix(".LICENSE.md").write_text(licence, encoding="utf-8", newline="\n")
    held_out = sum(record["split"] == "eval" for record in kept)
    print(
        f"python {platform.python_version()}: {len(kept) - held_out:,} training and {held_out:,} evaluation records, "
        f"{len(text.encode()):,} bytes"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
