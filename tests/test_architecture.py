"""The house: imports go down the floors, files stay short, rooms stay small, and every module is tested."""

from __future__ import annotations

import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import grimp
import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mavis"

MAX_LINES = 400
LONGER_FILES: dict[str, str] = {}
"""Package files that may have more lines, with the reason."""

MAX_FILES_OF_CRITICS = 12

TESTED_ELSEWHERE = {
    "cli/align.py": "cli/test_commands.py",
    "data/layouts.py": "data/test_pairs.py",
    "data/rows.py": "data/test_prompts.py",
    "policies/encoding.py": "policies/test_chat.py",
    "cli/build.py": "cli/test_commands.py",
    "cli/commands.py": "cli/test_main.py",
    "cli/conf_dir.py": "test_package.py",
    "cli/console.py": "cli/test_commands.py",
    "cli/demo.py": "cli/test_commands.py",
    "cli/distill.py": "cli/test_commands.py",
    "cli/entry_point.py": "cli/test_main.py",
    "cli/evaluate.py": "cli/test_commands.py",
    "cli/generate.py": "cli/test_commands.py",
    "cli/hydra_app.py": "cli/test_main.py",
    "cli/overrides.py": "cli/test_main.py",
    "cli/report.py": "cli/test_sweeps.py",
    "cli/run_status.py": "cli/test_progress.py",
    "cli/search_space.py": "cli/test_search.py",
    "cli/train.py": "cli/test_commands.py",
    "critics/attachment.py": "critics/test_hidden_state.py",
    "critics/base.py": "critics/test_hidden_state.py",
    "critics/group.py": "decoding/test_critic_group.py",
    "critics/head_critic.py": "critics/test_hidden_state.py",
    "critics/io/files.py": "critics/test_hidden_state.py",
    "critics/io/load.py": "critics/test_hidden_state.py",
    "critics/io/save.py": "critics/test_hidden_state.py",
    "critics/trained_decoding.py": "decoding/test_as_trained.py",
    "distributed/launch.py": "distributed/test_single_process.py",
    "distributed/process_group.py": "distributed/test_two_processes.py",
    "evaluation/efficiency.py": "evaluation/test_sweep.py",
    "evaluation/figure_style.py": "evaluation/test_plots.py",
    "evaluation/line_labels.py": "evaluation/test_plots.py",
    "evaluation/report.py": "evaluation/test_sweep.py",
    "evaluation/report_files.py": "evaluation/test_sweep.py",
    "evaluation/sweep_rollouts.py": "evaluation/test_sweep.py",
    "evaluation/sweep_row.py": "evaluation/test_sweep.py",
    "evaluation/sweeps/plots.py": "evaluation/sweeps/test_runs.py",
    "evaluation/sweeps/report.py": "evaluation/sweeps/test_runs.py",
    "exact/solve.py": "exact/test_world.py",
    "policies/applied_vectors.py": "vectors/test_applying.py",
    "policies/call_stack.py": "decoding/test_assisted_decoding.py",
    "policies/devices.py": "decoding/test_wrapped_policies.py",
    "policies/embeddings.py": "critics/test_hidden_state.py",
    "policies/fingerprint.py": "critics/test_hidden_state.py",
    "policies/forward_pass.py": "critics/test_recurrent.py",
    "policies/loading.py": "cli/test_commands.py",
    "policies/names.py": "critics/io/test_model_card.py",
    "policies/save.py": "recipes/test_embedded_policy.py",
    "policies/state_capture.py": "decoding/test_logits_processor.py",
    "policies/token_embeddings.py": "critics/test_hidden_state.py",
    "rewards/classifier_inputs.py": "rewards/test_reward_model.py",
    "training/accelerate_session.py": "distributed/test_deepspeed.py",
    "training/alignment/loop.py": "training/alignment/test_align.py",
    "training/alignment/reinforce.py": "training/alignment/test_align.py",
    "training/alignment/settings.py": "training/alignment/test_align.py",
    "training/distillation/imitation.py": "training/distillation/test_distill.py",
    "training/distillation/loop.py": "training/distillation/test_distill.py",
    "training/distillation/recordings.py": "training/distillation/test_distill.py",
    "training/distillation/settings.py": "training/distillation/test_distill.py",
    "training/improvement/loop.py": "training/improvement/test_improve.py",
    "training/improvement/policies.py": "training/improvement/test_improve.py",
    "training/improvement/report.py": "training/improvement/test_improve.py",
    "training/improvement/settings.py": "training/improvement/test_improve.py",
    "training/improvement/stages.py": "training/improvement/test_improve.py",
    "training/reward_model/classifier.py": "training/reward_model/test_loop.py",
    "training/reward_model/encoded_pairs.py": "training/reward_model/test_loop.py",
    "training/reward_model/fit.py": "training/reward_model/test_loop.py",
    "training/optimizer_state.py": "training/alignment/test_align.py",
    "training/regression.py": "training/improvement/test_fit.py",
    "training/run_folder.py": "training/improvement/test_improve.py",
    "vectors/emr.py": "vectors/test_combine.py",
    "vectors/model_tensors.py": "vectors/test_vector.py",
    "vectors/tensor_files.py": "vectors/test_vector.py",
    "vectors/vector_folder.py": "vectors/test_vector.py",
    "vectors/vector_set.py": "vectors/test_applying.py",
    "version.py": "cli/test_main.py",
    "vllm/logits_processor.py": "vllm/in_vllm/test_start.py",
    "vllm/recurrent_memory.py": "vllm/test_batch.py",
    "vllm/served_critic.py": "vllm/in_vllm/test_start.py",
    "vllm/value_model_runner.py": "vllm/test_batch.py",
    "vllm/watchdog.py": "vllm/in_vllm/test_rollouts.py",
}
"""Modules without a test file of their name, because they are part of what another file tests as a whole."""

UNTESTED = {"policies/protocol.py": "it only declares types, which mypy checks"}
"""Modules that no test covers, with the reason."""


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def contracts() -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    return settings["importlinter"]


# Imports


def test_imports_keep_the_contracts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_no_contract_looks_away_from_lazy_or_typing_imports() -> None:
    settings = contracts()
    for part in (settings, *settings["contracts"]):
        assert not {"exclude_type_checking_imports", "ignore_imports", "unmatched_ignore_imports_alerting"} & set(part)


def test_every_room_has_a_floor() -> None:
    (floors,) = (contract["layers"] for contract in contracts()["contracts"] if contract["type"] == "layers")
    on_a_floor = {room.strip() for floor in floors for room in floor.split("|")}
    rooms = {f"mavis.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    modules = {f"mavis.{path.stem}" for path in PACKAGE.glob("*.py")} - {"mavis.__init__", "mavis.version"}
    assert on_a_floor == rooms | modules


def test_no_module_imports_itself_by_way_of_others() -> None:
    """The same by a sorter of its own: each import counts, wherever in a module it stands."""
    graph = grimp.build_graph("mavis", cache_dir=None)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


# Sizes


def test_no_file_of_the_package_is_too_long() -> None:
    lines = {
        str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files(PACKAGE)
    }
    too_long = {name: count for name, count in lines.items() if count > MAX_LINES}
    assert too_long.keys() == LONGER_FILES.keys(), too_long


def test_the_room_of_critics_stays_small() -> None:
    assert len(list((PACKAGE / "critics").glob("*.py"))) <= MAX_FILES_OF_CRITICS


# Tests


def test_every_module_has_a_test_of_its_name_or_is_listed_with_where_it_is_tested() -> None:
    missing = []
    for path in python_files(PACKAGE):
        name = path.relative_to(PACKAGE)
        own = ROOT / "tests" / name.parent / f"test_{path.stem}.py"
        if not path.stem.startswith("__") and not own.is_file() and str(name) not in TESTED_ELSEWHERE | UNTESTED:
            missing.append(f"{name}: write {own.relative_to(ROOT)}, or list in TESTED_ELSEWHERE where it is tested")
    assert not missing, "\n".join(missing)


def test_what_is_listed_exists() -> None:
    for module, test in TESTED_ELSEWHERE.items():
        assert (PACKAGE / module).is_file(), module
        assert (ROOT / "tests" / test).is_file(), test
