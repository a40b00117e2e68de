"""The prompts of the core evaluation: assets/micro_suite.jsonl, and the hash that core_eval.py pins.

    python assets/make_micro_suite.py

Short questions with one answer each, in five categories, written for this project. A check is one of
``answer`` (the last word or number of the first line that says anything, letter case and punctuation aside),
``number`` (the last number in the text) and ``pattern`` (a regular expression that must be found).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

SUITE = Path(__file__).resolve().parent / "micro_suite.jsonl"

ARITHMETIC = [
    ("What is 7 + 5? Answer with the number only.", "12"),
    ("What is 46 - 19? Answer with the number only.", "27"),
    ("What is 8 * 9? Answer with the number only.", "72"),
    ("What is 144 / 12? Answer with the number only.", "12"),
    ("What is 25% of 80? Answer with the number only.", "20"),
    ("What is 3 to the power of 4? Answer with the number only.", "81"),
    ("Solve for x: 2x + 6 = 20. Answer with the number only.", "7"),
    ("What is the remainder of 47 divided by 5? Answer with the number only.", "2"),
    ("What is 0.5 * 36? Answer with the number only.", "18"),
    ("What is the sum of the numbers from 1 to 10? Answer with the number only.", "55"),
]
FACTS = [
    ("What is the capital of France? Answer with one word.", ["paris"]),
    ("Which planet is closest to the sun? Answer with one word.", ["mercury"]),
    ("What is the chemical symbol of gold? Answer with the symbol only.", ["au"]),
    ("How many days has a leap year? Answer with the number only.", ["366"]),
    ("Who wrote Hamlet? Answer with the surname only.", ["shakespeare"]),
    ("What is the largest ocean on Earth? Answer with one word.", ["pacific"]),
    ("Which gas do plants take from the air for photosynthesis? Answer with its name only.", ["dioxide", "co2"]),
    ("In which language is the Linux kernel mostly written? Answer with one letter.", ["c"]),
    ("How many bits are in a byte? Answer with the number only.", ["8", "eight"]),
    ("At how many degrees Celsius does water boil at sea level? Answer with the number only.", ["100"]),
]
REASONING = [
    ("Anna has 3 apples and buys 2 bags with 4 apples each. How many apples does she have? End with the number.", "11"),
    ("A train leaves at 14:20 and arrives at 15:05. How many minutes does it travel? End with the number.", "45"),
    ("Tom is twice as old as Ben, and Ben is 9. How old is Tom in 2 years? End with the number.", "20"),
    ("A box holds 6 rows of 5 eggs; 4 eggs are broken. How many are whole? End with the number.", "26"),
    ("If 3 pens cost 6 euros, how many euros do 7 pens cost? End with the number.", "14"),
    ("A list has the elements 4, 8, 15. What is their mean? End with the number.", "9"),
    ("Each of 4 friends shakes hands once with each other. How many handshakes are there? End with the number.", "6"),
    ("A rectangle is 7 wide and 3 high. What is its perimeter? End with the number.", "20"),
]
CODE = [
    (
        "Write a Python expression for the length of the list named items. Answer with the expression only.",
        r"\blen\(items\)",
    ),
    (
        "Write a Python function named add that returns the sum of a and b.",
        r"def add\(a, ?b\)[^\n]*:\s*(\"\"\".*?\"\"\"\s*)?return a ?\+ ?b",
    ),
    ("Write one line of Python that imports the module json.", r"(?m)^\s*import json\s*$"),
    (
        "Write a Python list comprehension of the squares of 0 to 9.",
        r"\[\s*(\w+) ?\*\* ?2 for \1 in range\((0, ?)?10\)\s*\]|\[\s*(\w+) ?\* ?\3 for \3 in range\((0, ?)?10\)\s*\]",
    ),
    ("Which Python keyword leaves a loop at once? Answer with the keyword only.", r"\bbreak\b"),
    ("Write a Python statement that raises a ValueError.", r"raise ValueError"),
]
FORMAT = [
    ("Answer with the word yes in lower case and nothing else.", r"\A\s*yes\s*\Z"),
    (
        'Answer with this JSON object and nothing else: {"ok": true}',
        r'\A\s*(```(json)?\s*)?\{\s*"ok"\s*:\s*true\s*\}\s*(```)?\s*\Z',
    ),
    ("Write the numbers from 1 to 5, separated by commas, and nothing else.", r"\A\s*1, ?2, ?3, ?4, ?5\.?\s*\Z"),
    ("Write the word stop in capital letters and nothing else.", r"\A\s*STOP[.!]?\s*\Z"),
    (
        "Write a bulleted list of exactly three fruits, each line beginning with a hyphen.",
        r"\A\s*(- ?[^\n]+\n){2}- ?[^\n]+\s*\Z",
    ),
    ("Answer with exactly two words: hello world", r"(?i)\A\s*hello,? world[.!]?\s*\Z"),
]


def items() -> list[dict[str, object]]:
    """The suite in order; ids count within a category."""
    found: list[dict[str, object]] = []

    def add(category: str, kind: str, rows: list[tuple[str, object]], tokens: int) -> None:
        for number, (prompt, wanted) in enumerate(rows, 1):
            check = {"kind": kind, "wanted": wanted}
            found.append(
                {"id": f"{category}-{number}", "category": category, "prompt": prompt, "check": check, "tokens": tokens}
            )

    add("arithmetic", "number", [(p, w) for p, w in ARITHMETIC], 16)
    add("facts", "answer", [(p, w) for p, w in FACTS], 16)
    add("reasoning", "number", [(p, w) for p, w in REASONING], 96)
    add("code", "pattern", [(p, w) for p, w in CODE], 64)
    add("format", "pattern", [(p, w) for p, w in FORMAT], 32)
    return found


if __name__ == "__main__":
    data = "".join(json.dumps(item, ensure_ascii=True) + "\n" for item in items()).encode()
    SUITE.write_bytes(data)
    print(f"{len(items())} prompts, SHA-256 {hashlib.sha256(data).hexdigest()}")
