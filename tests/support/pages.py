"""Runs the Python blocks of a page, in order, as pasted into one new session.

``python pages.py PAGE.md``. A block of ``text`` right after one of Python is its
output: words must agree; numbers to two percent, and to a factor of ten where they are
below 1e-3, that is, where they are rounding or an error.
"""

import contextlib
import io
import re
import sys
from pathlib import Path

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(text: str) -> list[tuple[str, str, str]]:
    """(language, code, output) of each block that is no output itself."""
    found = list(FENCE.finditer(text))
    made = []
    for i, block in enumerate(found):
        if block[1] == "text":
            continue
        after = found[i + 1] if i + 1 < len(found) else None
        near = after is not None and not text[block.end() : after.start()].strip()
        output = after[2] if near and after[1] == "text" else ""
        made.append((block[1], block[2], output))
    return made


def agree(expected: str, got: str) -> bool:
    """Whether two outputs say the same."""
    words, others = expected.split(), got.split()
    return len(words) == len(others) and all(map(_same, words, others))


def _same(word: str, other: str) -> bool:
    try:
        a, b = (float(w.strip("[](),%:;")) for w in (word, other))
    except ValueError:
        return word == other
    small = max(abs(a), abs(b)) < 1e-3
    if small:
        return abs(a) <= 10 * abs(b) + 1e-6 and abs(b) <= 10 * abs(a) + 1e-6
    return abs(a - b) <= 0.02 * max(abs(a), abs(b))


def main(page: str) -> int:
    """Returns the number of blocks that fail."""
    scope: dict = {"__name__": "__main__"}
    for language, code, expected in blocks(Path(page).read_text()):
        if language != "python":
            continue
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(code, page, "exec"), scope)
        except Exception as error:
            print(f"{page}: {type(error).__name__}: {error}\nin\n{code}")
            return 1
        if expected and not agree(expected, printed.getvalue()):
            print(f"{page}: the page has\n{expected}\nand\n{code}\ngives")
            print(printed.getvalue())
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
