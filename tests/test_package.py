"""What is installed, what importing it costs, and what the tree must not mention."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def run(command: list[str], cwd: Path, **environment: str) -> str:
    """Run a command as a user's shell would, and return what it prints."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# In a clone


def test_importing_it_needs_torch_transformers_numpy_and_safetensors_only(tmp_path: Path) -> None:
    code = """
import builtins
optional = "hydra omegaconf datasets accelerate matplotlib moocore vllm rich vaderSentiment textstat".split()
optional += "peft optuna filelock huggingface_hub tensorboard".split()
real_import = builtins.__import__
def guarded(name, globals=None, *rest, **named):
    if (globals or {}).get("__name__", "").startswith("mavis") and name.split(".")[0] in optional:
        raise ModuleNotFoundError(name)
    return real_import(name, globals, *rest, **named)
builtins.__import__ = guarded
import mavis
import sys
assert all(hasattr(mavis, name) for name in mavis.__all__)  # imports what each needs
assert "mavis.vectors" not in sys.modules
print(mavis.__version__, sorted(mavis.__all__))
"""
    assert "MavisTilt" in run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(ROOT))


def tracked_files() -> list[Path]:
    """List the files that a clone has."""
    command = ["git", "ls-files", "-z", "--cached"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


FOREIGN = {
    "a number in somebody's tracker": r"(?i:\b(?:issues?|closes|fixes|see) #?\d+\b)|\(#\d+\)",
    "who wrote it": r"\b(?:AI|coding|helper|sub|LLM)[ -]?agents?\b|\b(?:this|earlier|previous|last|next) session\b",
    "a folder of one machine": r"(?<![\w.}/])/(?:work|home|root|Users)/\w|/tmp/brief",
    "the host of a package registry": r"\bpypi\.|pythonhosted|anaconda\.(?:org|com)|artifactory|--(?:extra-)?index-url",
}


def foreign_in(text: str) -> list[str]:
    """List what a text mentions that only makes sense where it was written."""
    return [f"{what}: {found[0]}" for what, pattern in FOREIGN.items() for found in re.finditer(pattern, text)]


@pytest.mark.parametrize(
    "text",
    [
        "see issue 17",
        "Issue " + "#3",
        "closes (#12)",
        "an AI agent",
        "this session",
        "in /work/main",
        "pypi.org/simple",
    ],
)
def test_what_is_foreign_is_recognised(text: str) -> None:
    assert foreign_in(text)


@pytest.mark.parametrize(
    "text", ["agent-detector==2.0.0", 'scope="session"', "https://github.com/o/n/issues", "fill: #000000", "a/work/b"]
)
def test_what_is_not_foreign_passes(text: str) -> None:
    assert not foreign_in(text)


def test_no_file_mentions_what_a_reader_cannot_know() -> None:
    found = []
    for path in tracked_files():
        if path != Path(__file__).resolve() and path.suffix not in {".safetensors", ".svg", ".png"}:
            text = path.read_text(encoding="utf-8")
            found += [f"{path.relative_to(ROOT)}: {mention}" for mention in foreign_in(text)]
    assert not found


# From a wheel


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a wheel and a source distribution of the checkout."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> zipfile.ZipFile:
    """The wheel, open."""
    (path,) = distributions.glob("mavis_decoding-*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def environment(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel in it, which borrows only the dependencies of the one that runs the tests.

    Its `bin` is returned. The folder of this environment's packages is on its path, but the `.pth` files in it are not
    read, so that an editable installation of the checkout is not seen.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    installer = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    run([*installer, str(wheel.filename)], folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    borrowed = run([sys.executable, "-c", "import torch; print(torch.__path__[0])"], folder).strip()
    (packages / "dependencies.pth").write_text(f"{Path(borrowed).parent}\n", encoding="utf-8")
    return folder / "bin"


def test_the_command_runs(environment: Path, tmp_path: Path) -> None:
    shown = run([str(environment / "mavis"), "--help"], tmp_path)
    assert "mavis <command>" in shown
    assert "generate" in shown


def test_it_composes_its_configuration_and_steers_the_embedded_policy(environment: Path, tmp_path: Path) -> None:
    code = """
import mavis, torch
from hydra import compose, initialize_config_dir
from mavis.cli.conf_dir import conf_dir

with initialize_config_dir(conf_dir(), version_base="1.3"):
    config = compose("demo")
policy, tokenizer = mavis.embedded.load()
critic = mavis.Critic.from_pretrained(mavis.embedded.critic_path())
inputs = tokenizer("Once upon a time", return_tensors="pt")
torch.manual_seed(0)
output = mavis.generate(policy, inputs, critic=critic, weights={"positive": 1.0}, target_kl=2.0, max_new_tokens=32)
print(mavis.__file__, conf_dir(), sorted(config.objectives), output.shape[1] - inputs.input_ids.shape[1], sep="\\n")
"""
    file, conf, objectives, tokens = run([str(environment / "python"), "-c", code], tmp_path).splitlines()
    assert Path(file).is_relative_to(environment.parent)
    assert Path(conf) == Path(file).parent / "conf"
    assert objectives == "['dialogue', 'positive']"
    assert tokens == "32"


def test_it_brings_the_sweeper_of_the_search(environment: Path, tmp_path: Path) -> None:
    code = """
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
print([f"{one.__module__}.{one.__name__}" for one in Plugins.instance().discover(Sweeper)])
import sys
assert "mavis" not in sys.modules, "every Hydra app would pay for it"
"""
    assert "hydra_plugins.mavis_search.MavisSearch" in run([str(environment / "python"), "-c", code], tmp_path)


def test_a_wheel_holds_the_package_its_configuration_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mavis", "hydra_plugins"}
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"mavis/conf/{path.relative_to(ROOT / 'conf')}" in names
    embedded = "mavis/policies/embedded"
    weights = {f"{embedded}/model.safetensors", f"{embedded}/critic/model.safetensors"}
    assert weights | {"mavis/py.typed", f"{embedded}/openings.txt"} <= names
    assert not [name for name in names if name.endswith((".pt", ".pth", ".bin", ".pkl", ".ckpt", ".pyc"))]
    assert max(info.file_size for info in wheel.infolist()) < 6_000_000


def test_a_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["Name"] == "mavis-decoding"
    assert metadata["License-Expression"] == "MIT"
    assert f'"{metadata["Version"]}"' in (ROOT / "mavis" / "version.py").read_text(encoding="utf-8")
    assert set(metadata.get_all("Provides-Extra") or []) == set(project["optional-dependencies"])
    assert {url.partition(",")[0] for url in metadata.get_all("Project-URL") or []} == set(project["urls"])


def test_a_source_distribution_holds_all_that_its_tests_need(distributions: Path) -> None:
    (path,) = distributions.glob("mavis_decoding-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {path.relative_to(ROOT).as_posix() for path in tracked_files()}
    left_out = {name for name in tracked if name.startswith((".ci/", ".github/", ".pre-commit"))}
    assert tracked - left_out <= names
    assert not [name for name in names if name.startswith(("outputs", "multirun", ".venv")) or name.endswith(".pyc")]
