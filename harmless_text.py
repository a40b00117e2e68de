"""Text that somebody else wrote, made fit for a terminal: data rows, samples, names of files, answers of models."""

from __future__ import annotations

from typing import Any


def harmless(text: Any, most: int = 4000) -> str:
    """Text that somebody else wrote, made fit for a terminal: control characters, and those that turn the direction of
    writing, become visible; newlines and tabs stay. Cut at ``most`` characters."""
    return "".join(_visible(c) for c in str(text)[:most])


def _visible(c: str) -> str:
    code = ord(c)
    if c in "\n\t" or 0x20 <= code < 0x7F:
        return c
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    turns = code in (0x061C, 0x200E, 0x200F) or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    if code < 0xA0 or turns or 0xD800 <= code <= 0xDFFF or code in (0x2028, 0x2029):
        return f"\\u{code:04x}"
    return c
