"""What is installed, and what importing it costs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, path: Path, where: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=where,
        env=environment | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
assert "mavis.vectors" not in sys.modules
print(mavis.__version__, sorted(mavis.__all__))
"""
    assert "MavisTilt" in python(code, ROOT, tmp_path)


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout, unpacked as an installation would."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_carries_the_configuration_the_policy_and_its_types(unpacked_wheel: Path, tmp_path: Path) -> None:
    assert (unpacked_wheel / "mavis" / "py.typed").is_file()
    code = """
from hydra import compose, initialize_config_dir
from mavis.policies import embedded
from mavis.cli.conf_dir import conf_dir
with initialize_config_dir(conf_dir(), version_base="1.3"):
    config = compose("demo")
policy, tokenizer = embedded.load()
print(conf_dir(), sorted(config.objectives), policy.config.vocab_size, len(tokenizer("Hi").input_ids))
"""
    printed = python(code, unpacked_wheel, tmp_path)
    assert str(unpacked_wheel / "mavis" / "conf") in printed
    assert "['dialogue', 'positive']" in printed


def test_a_wheel_brings_the_sweeper_of_the_search(unpacked_wheel: Path, tmp_path: Path) -> None:
    code = """
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
print([f"{one.__module__}.{one.__name__}" for one in Plugins.instance().discover(Sweeper)])
import sys
assert "mavis" not in sys.modules, "every Hydra app would pay for it"
"""
    assert "hydra_plugins.mavis_search.MavisSearch" in python(code, unpacked_wheel, tmp_path)


def test_a_wheel_holds_no_pickle_and_nothing_large(unpacked_wheel: Path) -> None:
    files = [path for path in unpacked_wheel.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in {".pt", ".pth", ".bin", ".pkl", ".ckpt"}]
    assert max(path.stat().st_size for path in files) < 6_000_000
