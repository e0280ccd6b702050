"""Uploading and downloading critics with the real client and a fake hub on a local port."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mavis.critics import Critic

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
TOKEN = "hf_may_write"


@pytest.fixture
def run_python(hub: Any, tmp_path: Path) -> Any:
    """A function that runs Python in a process that uses the fake hub, and returns its output."""

    def run(code: str, token: str = TOKEN, **environment: str) -> str:
        given = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        given |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "no_proxy": "127.0.0.1",
        }
        code = f"import mavis\nfrom mavis.errors import MavisError\n{code}"
        done = subprocess.run(
            [sys.executable, "-W", "error::UserWarning:mavis", "-c", code],
            env=given | environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_pushed_critic_loads_unchanged(hub: Any, run_python: Any, make_tiny_critic: Any, tmp_path: Path) -> None:
    critic = make_tiny_critic()
    critic.about = {"policy": "somebody/tiny", "data": "prompts.txt"}
    critic.save_pretrained(tmp_path / "critic")
    printed = run_python(
        """
critic = mavis.Critic.from_pretrained("critic")
print(critic.push_to_hub("me/two", private=True, commit_message="The first one"))
critic.reward_mean += 1
print(critic.push_to_hub("me/two", commit_message="Another mean"))
print(critic.push_to_hub("me/two", revision="try/this", commit_message="On a branch"))
mavis.Critic.from_pretrained("me/two").save_pretrained("back")
branch = mavis.Critic.from_pretrained("me/two", revision="try/this")
print(branch.about["policy"])
"""
    )
    first, second, branch, policy = printed.splitlines()
    assert all(url.startswith(f"{hub.url}/me/two/commit/") for url in (first, second, branch))
    assert policy == "somebody/tiny"
    assert hub.messages == ["The first one", "Another mean", "On a branch"]
    assert hub.private == {"me/two"}
    assert [len(commits) for commits in hub.repositories["me/two"].values()] == [2, 3]
    oid, files = hub.repositories["me/two"]["main"][0]
    assert first.endswith(oid)
    # The upload is byte for byte what `save_pretrained` writes.
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "critic").iterdir()}
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    back = Critic.from_pretrained(tmp_path / "back")
    assert torch.equal(back.reward_mean, critic.reward_mean + 1)
    for name, tensor in critic.state_dict().items():
        assert name == "reward_mean" or torch.equal(back.state_dict()[name], tensor), name


def test_guide_runs(hub: Any, run_python: Any, make_tiny_critic: Any, tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "guides" / "hub.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```py\n(.*?)```", guide, flags=re.DOTALL)
    (calls,) = [block for block in blocks if "push_to_hub" in block]
    make_tiny_critic().save_pretrained(tmp_path / "critic")
    run_python(
        f'critic = mavis.Critic.from_pretrained("critic")\n{calls}\nassert critic.objectives == ("good", "brevity")'
    )
    assert list(hub.repositories) == ["me/happy-stories"]


def test_commits_can_be_selected_and_the_cache_works_offline(
    hub: Any, run_python: Any, make_tiny_critic: Any, tmp_path: Path
) -> None:
    make_tiny_critic().save_pretrained(tmp_path / "critic")
    run_python('critic = mavis.Critic.from_pretrained("critic"); critic.push_to_hub("me/it"); critic.reward_mean += 1')
    oid = hub.repositories["me/it"]["main"][0][0]
    first = f'print(mavis.Critic.from_pretrained("me/it", revision="{oid}").reward_mean.tolist())'
    newest = 'print(mavis.Critic.from_pretrained("me/it").reward_mean.tolist())'
    online = run_python(f"{first}\n{newest}").splitlines()
    assert [json.loads(line) for line in online] == [[0.0, 0.0]] * 2
    assert json.loads(run_python(newest, HF_HUB_OFFLINE="1")) == [0.0, 0.0]


def test_failures_are_errors_of_one_line(hub: Any, run_python: Any, make_tiny_critic: Any, tmp_path: Path) -> None:
    make_tiny_critic().save_pretrained(tmp_path / "critic")
    calls = {
        'mavis.Critic.from_pretrained("me/nothing")': "folder is 'me/nothing', which does not exist",
        'mavis.Critic.from_pretrained("me/nothing", revision="v1")': "folder is 'me/nothing'",
        'critic.push_to_hub("me/two", token="hf_other")': "repo_id is 'me/two', to which the upload failed",
        'critic.push_to_hub("me/../two")': "repo_id is 'me/../two', to which the upload failed",
    }
    tried = "".join(f"try:\n    print({call})\nexcept MavisError as error:\n    print(error)\n" for call in calls)
    lines = run_python(f'critic = mavis.Critic.from_pretrained("critic")\n{tried}').splitlines()
    for line, message in zip(lines, calls.values(), strict=True):
        assert message in line
        assert " Hint: " in line
        assert "hf_" not in line.split(" Hint: ")[0]  # tokens are not logged
    assert not hub.repositories


def test_repository_without_a_critic_is_refused(hub: Any, run_python: Any) -> None:
    hub.repositories["me/model"] = {"main": [("a" * 40, {"config.json": b'{"model_type": "llama"}'})]}
    printed = run_python(
        'try:\n    mavis.Critic.from_pretrained("me/model")\nexcept MavisError as error:\n    print(error)'
    )
    assert "is not the config of a critic" in printed
