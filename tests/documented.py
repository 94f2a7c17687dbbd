"""Shell commands that Markdown files show: the fenced blocks, their lines joined and split into words."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r" *```+ *(\w*)")
_SHELLS = ("", "sh", "bash", "shell", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block of a Markdown file.

    Attributes:
        file: its path.
        line: number of its first line, from 1.
        language: what its fence names.
        text: its lines, without what they all are indented by.
    """

    file: Path
    line: int
    language: str
    text: str

    @property
    def first_word(self):
        """The first word of the first line that is no comment; "" without one."""
        lines = [line.split() for line in self.text.splitlines()]
        return next((words[0] for words in lines if words and not words[0].startswith("#")), "")

    @property
    def is_shell(self):
        """Whether it may hold commands, by its fence."""
        return self.language in _SHELLS

    def commands(self):
        """Each command as its words: lines that end in a backslash are joined, comments dropped."""
        found = []
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                found.append(words[:end])
                words = words[end + 1 :]
        return found


def blocks(file):
    """The fenced blocks of a Markdown file."""
    found, start, language, lines = [], None, "", []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if fence and start is None:
            start, language, lines = number + 1, fence[1], []
        elif fence:
            found.append(Block(file, start, language, "\n".join(lines)))
            start = None
        elif start is not None:
            lines.append(line.strip() if line.strip().startswith("#") else line)
    assert start is None, f"{file}: the block of line {start} has no end"
    return found
