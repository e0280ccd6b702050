"""The Markdown pages and their code blocks."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if path.parent.name != "benchmarks")]
"""Every page that people write; those of the benchmarks are generated, and have tests of their own."""


@dataclass(frozen=True)
class Block:
    """A fenced block: `python` and `sh` are run, `text` is what the block before it prints, `py` needs a network."""

    language: str
    code: str

    def commands(self) -> list[list[str]]:
        """Split a shell block into commands, without their comments."""
        joined = self.code.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def name_of(page: Path) -> str:
    """Name a page by its path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """List the fenced blocks of a page in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [Block(language, code) for language, code in found]
