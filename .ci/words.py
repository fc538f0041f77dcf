"""Reports discouraged words in the tracked files and suggests replacements.

    python .ci/words.py

Prints `path:line: word: use ...` for each word, and exits with 1 if there are any. Words within
names, such as `_repair_told`, and phrases across line breaks are also found. codespell, which
.ci/check runs first, reports British spellings.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FILES = ("*.py", "*.md", "*.yaml", "*.yml", "*.toml", "*.sh", "*.ipynb", ".ci/*")

# Regular expressions in lower case; a space also matches a line break.
WORDS = {
    r"anew|afresh": "again, from scratch",
    r"beside": "next to, in addition to",
    r"by the means of": "by, with",
    r"(?:for )?once and for all|for once and all": "once",
    r"for want of": "for lack of",
    r"go on|goes on|going on|went on|gone on": "continue, resume",
    r"hang on|hangs on|hanging on|hung on": "depend on",
    r"in vain": "needlessly",
    r"likeliest": "most likely",
    r"likewise": "also, in the same way",
    r"mend|mends|mended|mending": "fix, repair",
    r"need be": "must be, has to be",
    r"nobody": "no one, or name the subject",
    r"of which|of whom": "a separate sentence, or whose",
    r"reckon|reckons|reckoned": "expect, estimate",
    r"shall": "must, will",
    r"surest": "most confident",
    r"that which": "what",
    r"there(?:by|in|of|to|upon|with)|where(?:by|in|of|to|upon|with)": "a separate sentence",
    r"told(?!.apart)": "reported, message, output",
    r"way round": "way around, vice versa",
    r"whilst|amongst|upon|unto|lest": "while, among, on, so that",
}

# Words that are correct in a file, as (path, word) in lower case with single spaces.
ALLOWED = {
    ("tests/test_project.py", "mend"),
    ("tests/test_project.py", "of which"),
    ("tests/test_project.py", "told"),
}


def main() -> int:
    """Prints every discouraged word; returns the number of problems, at most 1."""
    words = {re.compile(_bounded(word)): advice for word, advice in WORDS.items()}
    problems = [
        f"{path}:{line}: {word}: use {advice}"
        for path in _tracked()
        for line, word, advice in sorted(_found(path.read_text(encoding="utf-8"), words))
        if (path.as_posix(), word) not in ALLOWED
    ]
    print(*problems, sep="\n", end="\n" * bool(problems))
    return int(bool(problems))


def _bounded(word: str) -> str:
    word = word.replace(" ", r"[\s#]+")  # includes comment signs, for phrases in comments
    return rf"(?<![^\W_])(?:{word})(?![^\W_])"  # underscores separate the words of a name


def _tracked() -> Iterator[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", *FILES], capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split("\0")[:-1]:
        if name != ".ci/words.py" and Path(name).is_file():  # skips deleted files
            yield Path(name)


def _found(text: str, words: dict[re.Pattern[str], str]) -> Iterator[tuple[int, str, str]]:
    """Yields line number, word and advice for each discouraged word in a text."""
    text = text.lower()
    for pattern, advice in words.items():
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield line, re.sub(r"[\s#]+", " ", match.group()), advice


if __name__ == "__main__":
    sys.exit(main())
