"""Build-time pages of the site: the command line, the configuration, contributing and the changelog.

MkDocs calls `on_files` (see `hooks` in mkdocs.yml). Everything is read from the sources, so no page
can fall behind.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"

SETTINGS = {
    "improvement": ("mavis.training.ImprovementSettings", "mavis.rollouts.RolloutSettings"),
    "improvement.fit": ("mavis.training.FitSettings", "mavis.training.RegressionSettings"),
    "evaluation": ("mavis.evaluation.EvaluationSettings", "mavis.rollouts.RolloutSettings"),
    "decoding": ("mavis.rollouts.RolloutSettings",),
    "distillation": ("mavis.training.DistillSettings", "mavis.rollouts.RolloutSettings"),
    "distillation.fit": ("mavis.training.RegressionSettings",),
    "alignment": ("mavis.training.AlignSettings",),
}
"""The dataclasses behind the settings, whose docstrings explain what the YAML files leave without a comment."""

GROUPS = {
    "policy": "The model that is steered.",
    "data": "Training and evaluation prompts.",
    "objective": "What a response is scored for; several at once as `objective=[positive,brevity]`.",
    "critic": "What the value heads read.",
    "decoding": "How responses are sampled.",
    "improvement": "How a critic is trained.",
    "sampler": "What draws the rollouts of training.",
    "evaluation": "What `mavis evaluate` measures.",
    "experiment": "Presets that change settings in several groups.",
    "launcher": "Where the runs of a sweep (`-m`) run.",
}
"""The groups in the order in which a reader meets them; others follow."""

COMMAND_LINE = """\
# Command line

`mavis <command> [name=value ...]` runs a command. `mavis <command> --help` lists its settings, and `--cfg job` prints
them as they would be used. Settings are [Hydra](https://hydra.cc) overrides: `name=value` sets a value, `group=option`
picks a file of [a group](configuration.md), and `-m` runs every combination of values that are separated by commas.
Results go to standard output and progress to standard error; the exit status is 0, 1 for an error, or 2 for a mistake
in the arguments.
"""

CONFIGURATION = """\
# Configuration

Commands are configured with [Hydra](https://hydra.cc): each folder of `conf/` is a group, and each file in it an
option, chosen by `group=option` and changed by `group.setting=value`. The defaults are those of the settings
dataclasses in the Python API.

`mavis <command> --cfg job` prints the configuration that a command would use, and every run keeps its own in `.hydra/`
beside its results.
"""


@dataclass(frozen=True)
class Setting:
    """One line of a YAML file: dotted name, default as written, and the comment beside or above it."""

    name: str
    default: str
    comment: str


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "reference/cli.md": command_line_page(),
        "reference/configuration.md": configuration_page(),
        "contributing.md": root_page("CONTRIBUTING.md", config.extra["repository"]),
        "changelog.md": root_page("CHANGELOG.md", config.extra["repository"]),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def command_line_page() -> str:
    """Describe every command: its examples, its own settings and the groups it takes."""
    from mavis.cli import COMMANDS

    lines = [
        COMMAND_LINE,
        "| Command | What it does |",
        "| --- | --- |",
        *(f"| [`mavis {name}`](#mavis-{name}) | {_cell(_sentence(what))} |" for name, what in COMMANDS.items()),
    ]
    for name, what in COMMANDS.items():
        content = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
        examples, notes = _examples_and_notes(content["hydra"]["help"]["header"])
        lines += ["", f"## mavis {name}", "", _sentence(what), "", "```text", *examples, "```"]
        lines += ["", notes] if notes else []
        parents = [entry for entry in content.get("defaults", []) if isinstance(entry, str) and entry in COMMANDS]
        if parents:
            parent = parents[0]
            lines += ["", f"It takes all settings of [`mavis {parent}`](#mavis-{parent}), and those below."]
        groups = [key for key, _ in _groups(content)]
        if groups:
            links = ", ".join(f"[`{group}`](configuration.md#{group})" for group in groups)
            lines += ["", f"Groups: {links}."]
        own = [one for one in settings(CONF / f"{name}.yaml") if not one.name.startswith("hydra.")]
        lines += ["", *_table([_explained(one) for one in own])] if own else []
    return "\n".join(lines) + "\n"


def configuration_page() -> str:
    """Describe every option of every configuration group."""
    found = [folder.name for folder in sorted(CONF.iterdir()) if folder.is_dir()]
    groups = [name for name in GROUPS if name in found]
    groups += [name for name in found if name not in GROUPS and _options(name)]
    lines = [CONFIGURATION]
    for group in groups:
        if not (options := _options(group)):
            continue
        lines += ["", f"## {group}", "", GROUPS.get(group, "")]
        references = [f"[`{path}`][{path}]" for path in SETTINGS.get(group, ())]
        if references:
            lines += ["", f"In Python: {', '.join(references)}."]
        for path in options:
            package = _package(path)
            own = [replace(one, name=f"{package}{one.name}") for one in settings(path)]
            lines += ["", f"### {group}={path.stem}", "", _description(path)]
            base = _base(path)
            lines += ["", f"As [`{group}={base}`](#{group}{base}), except:"] if base and own else []
            lines += ["", *_table([_explained(one) for one in own])] if own else []
    return "\n".join(lines) + "\n"


def root_page(name: str, repository: str) -> str:
    """Read a Markdown file of the repository's root, with its relative links turned into links that the site has."""

    def link(match: re.Match[str]) -> str:
        target = match[1]
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        if target.startswith("docs/"):
            return f"]({target.removeprefix('docs/')})"
        same_site = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
        return f"]({same_site.get(target) or f'{repository}/blob/main/{target}'})"

    path = ROOT / name
    return re.sub(r"\]\(([^)\s]+)\)", link, path.read_text(encoding="utf-8"))


def settings(path: Path) -> list[Setting]:
    """List the settings of a YAML file with their comments; `defaults` is left out.

    The files are regular (two spaces a level, one key a line), which a few lines can read; no YAML parser keeps the
    comments.
    """
    found: list[Setting] = []
    stack: list[tuple[int, str]] = []
    above: list[str] = []
    header = True
    for line in path.read_text(encoding="utf-8").splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            above += [] if header else [stripped.lstrip("# ")]
            continue
        if not stripped:
            above = []
            continue
        header = False
        indent = len(line) - len(line.lstrip())
        stack = [entry for entry in stack if entry[0] < indent]
        text, comment = _split_comment(stripped)
        if text.startswith("- "):  # an item of the list that the last key holds
            if found and stack and found[-1].name == ".".join(key for _, key in stack):
                items = [found[-1].default, text[2:]] if found[-1].default else [text[2:]]
                found[-1] = replace(found[-1], default=", ".join(items))
            continue
        key, _, value = text.partition(":")
        stack.append((indent, key))
        comment = " ".join([*above, *([comment] if comment else [])])
        found.append(Setting(".".join(name for _, name in stack), value.strip(), comment))
        above = []
    names = {one.name for one in found}
    parents = {name.rpartition(".")[0] for name in names}
    return [
        one
        for one in found
        if one.name.split(".")[0] != "defaults" and (one.name not in parents or one.comment or one.default)
    ]


def _split_comment(text: str) -> tuple[str, str]:
    match = re.match(r"""((?:"[^"]*"|'[^']*'|[^"'#]|(?<! )#)*?)\s+#\s*(.*)$""", text)
    return (match[1].rstrip(), match[2]) if match else (text, "")


def _options(group: str) -> list[Path]:
    """The files of a group, the default one first where one of them is called so."""
    paths = sorted((CONF / group).glob("*.yaml"))
    return sorted(paths, key=lambda path: (path.stem not in ("default", "none", "embedded", "serial"), path.stem))


def _package(path: Path) -> str:
    """The prefix that a file's settings have in the composed configuration."""
    directive = re.search(r"^# @package (\S+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if directive is None:
        return f"{path.parent.name}."
    return "" if directive[1] == "_global_" else f"{directive[1]}."


def _base(path: Path) -> str | None:
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    names = [entry for entry in content.get("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    return names[0] if names and (path.parent / f"{names[0]}.yaml").exists() else None


def _groups(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for entry in content.get("defaults", []):
        if isinstance(entry, dict):
            for key, value in entry.items():
                name = key.removeprefix("override ")
                if (CONF / name).is_dir() and _options(name) and not name.startswith("hydra"):
                    yield name, value


def _description(path: Path) -> str:
    """The comment at the top of a file, without Hydra's own directive."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(f"    {line.strip()}" if line.startswith("  ") else _prose(line) for line in _spaced(lines))


def _spaced(lines: list[str]) -> Iterator[str]:
    """Put an empty line where a code block begins or ends."""
    indented = False
    for line in lines:
        if line.startswith("  ") != indented:
            indented = not indented
            yield ""
        yield line


def _examples_and_notes(header: str) -> tuple[list[str], str]:
    """Split the head of a help text, below its title, into the indented examples and the prose."""
    lines = [line for line in header.strip().splitlines()[1:] if line.strip()]
    examples = [line.strip() for line in lines if line.startswith("  ")]
    notes = " ".join(line.strip() for line in lines if not line.startswith("  "))
    return examples, _prose(re.sub(r"(mavis [a-z]+ \S+=.*)$", r"`\1`", notes))


def _explained(setting: Setting) -> Setting:
    """Take the comment of a setting that has none from the dataclass behind it."""
    if setting.comment:
        return setting
    group, _, name = setting.name.rpartition(".")
    for path in SETTINGS.get(group, ()):
        module, _, cls = path.rpartition(".")
        meanings = _arguments(getattr(importlib.import_module(module), cls).__doc__ or "")
        if name in meanings:
            return replace(setting, comment=meanings[name])
    return setting


def _arguments(docstring: str) -> dict[str, str]:
    """Read the `Args:` section of a docstring."""
    match = re.search(r"Args:\n(.*?)(?:\n\s*\n|\Z)", docstring, flags=re.DOTALL)
    if match is None:
        return {}
    found: dict[str, str] = {}
    name, base = "", len(match[1]) - len(match[1].lstrip())
    for line in match[1].splitlines():
        start = re.match(rf"\s{{{base}}}(\w+): (.*)", line)
        if start:
            name, found[start[1]] = start[1], start[2]
        elif name:
            found[name] += f" {line.strip()}"
    return found


def _table(rows: list[Setting]) -> list[str]:
    lines = ["| Setting | Default | Meaning |", "| --- | --- | --- |"]
    for row in rows:
        default = "required" if row.default == "???" else f"`{row.default}`" if row.default else ""
        lines.append(f"| `{row.name}` | {_cell(default)} | {_cell(row.comment)} |")
    return lines


def _cell(text: str) -> str:
    return (text if text.startswith("`") else _prose(text)).replace("|", "\\|")


def _prose(text: str) -> str:
    """Keep plain text from being read as HTML, and set the commands in it as code."""
    parts = re.split(r"(`[^`]*`)", re.sub(r"(?<!`)(pip install '[^']+')", r"`\1`", text))
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;").replace("*", "\\*") for part in parts)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
