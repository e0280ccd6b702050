"""A single process: its environment, its share of work, and launches that are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from mavis.distributed import ProcessGroup, join_processes, launcher_rank, launcher_world_size
from mavis.errors import ConfigError, ProcessError
from mavis.training.accelerate_session import accelerator, check_sharding
from mavis.training.rollout_tensors import shard_indices


@pytest.mark.parametrize(
    ("given", "together", "number"),
    [
        ({}, 1, 0),
        ({"WORLD_SIZE": "4", "RANK": "2"}, 1, 0),  # a cluster may set these for every job
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "4", "RANK": "3"}, 4, 3),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "1", "RANK": "0"}, 1, 0),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2"}, 3, 2),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, 2, 1),
    ],
)
def test_the_environment_of_launchers_is_read(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], together: int, number: int
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert (launcher_world_size(), launcher_rank()) == (together, number)


def test_a_single_process_is_the_main_one_and_changes_no_global_state() -> None:
    found = join_processes("cpu")
    assert found == ProcessGroup() == join_processes()
    assert found.is_main
    assert found.shard([1, 2, 3]) == [1, 2, 3]
    values = torch.tensor([1.0])
    assert found.all_reduce_sum(values) is values
    found.barrier()
    found.check_agreement("nothing", {"a": 1})
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_hold_each_item_once(count: int) -> None:
    shares = [list(ProcessGroup(index, count).shard(range(20))) for index in range(count)]
    assert sorted(item for share in shares for item in share) == list(range(20))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    local_indices = torch.cat([shard_indices(20, ProcessGroup(index, count)) for index in range(count)])
    assert sorted(local_indices.tolist()) == list(range(20))


def test_fewer_rollouts_than_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match="there are 3 rollouts for 4 processes. Hint: sample more"):
        shard_indices(3, ProcessGroup(1, 4))


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match="process 1 does not see .*, which process 0 has written. Hint: put the out"):
        ProcessGroup(1, 2).check_shared_path(tmp_path / "run.json")


def test_a_lost_process_is_reported_in_one_line_and_other_errors_are_raised_as_they_are() -> None:
    with pytest.raises(ProcessError, match="process 0 of 2 lost another process"), ProcessGroup(0, 2).collective():
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    for processes in (ProcessGroup(), ProcessGroup(0, 2)):
        with pytest.raises(RuntimeError, match="^shapes$"), processes.collective():
            raise RuntimeError("shapes")


@pytest.fixture
def no_state() -> None:
    """Other tests in this process may have left one, as trainers of other libraries do."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("no_state")
def test_the_state_of_accelerate_is_restored() -> None:
    assert PartialState._shared_state == {}
    for _ in range(2):  # so that another device can be next
        with accelerator(torch.device("cpu")) as borrowed:
            assert borrowed.device.type == "cpu"
        assert PartialState._shared_state == {}


@pytest.mark.usefixtures("no_state")
def test_accelerate_stays_until_the_last_of_several_fits_has_ended() -> None:
    first, second = accelerator(torch.device("cpu")), accelerator(torch.device("cpu"))
    first.__enter__()
    other = second.__enter__()
    first.__exit__(None, None, None)
    assert other.state.device.type == "cpu"
    second.__exit__(None, None, None)
    assert PartialState._shared_state == {}


def test_an_accelerator_of_the_user_is_kept() -> None:
    own = Accelerator(cpu=True)
    try:
        with accelerator(torch.device("cpu")):
            pass
        assert own.state.device.type == "cpu"
        assert own.num_processes == 1
        model = own.prepare(torch.nn.Linear(2, 2))
        assert next(model.parameters()).device.type == "cpu"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP 1"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ],
)
def test_unsupported_sharding_is_refused(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], shown: str) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"configured for {shown}, which mavis does not train with. Hint: shard by"):
        check_sharding()


def test_processes_unknown_to_accelerate_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState

    Accelerator(cpu=True)  # a script's own, built before the launcher's environment was looked at
    try:
        for name, value in {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match="there are 2 processes, but Accelerate runs this one alone. Hint:"):
            join_processes("cpu")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("requested", [1, 2])
def test_a_launcher_that_starts_fewer_processes_than_requested_is_refused(
    monkeypatch: pytest.MonkeyPatch, requested: int
) -> None:
    arguments = f"--cpu --num_processes {requested} --num_machines 1 --mixed_precision no --dynamo_backend no job.py"
    # The environment that Accelerate gives to the one process that it starts.
    given = prepare_simple_launcher_cmd_env(launch_command_parser().parse_args(arguments.split()))[1]
    for name in given.keys() - os.environ.keys():
        monkeypatch.setenv(name, given[name])
    if requested == 1:
        assert join_processes("cpu") == ProcessGroup()
        return
    with pytest.raises(
        ConfigError,
        match="several processes were requested, but `accelerate launch --cpu` starts only one. Hint: start",
    ):
        join_processes("cpu")
