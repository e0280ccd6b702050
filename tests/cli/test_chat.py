"""A conversation in the terminal: what is typed, what is answered, what is kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import mavis as package
from mavis.cli.chat import COMMANDS, Chat
from mavis.decoding import respond
from mavis.errors import MavisError
from mavis.policies import embedded, load_policy

TEMPLATE = (Path(__file__).parents[1] / "policies" / "chat_templates" / "zephyr.jinja").read_text(encoding="utf-8")


@pytest.fixture
def chat() -> tuple[Chat, list[str]]:
    """A conversation with the embedded policy, which is given a chat template, and what it has written."""
    policy, tokenizer = package.embedded.load()
    tokenizer.chat_template = TEMPLATE
    critic = package.Critic.from_pretrained(embedded.critic_path())
    written: list[str] = []
    decoding = {"max_new_tokens": 12, "top_k": "as_trained", "temperature": "as_trained"}
    weights = {"positive": 1.0, "dialogue": 0.0}
    return Chat(policy, tokenizer, critic, decoding, weights, beta=3.0, write=written.append), written


def test_answers_are_streamed_and_kept(chat: tuple[Chat, list[str]]) -> None:
    talk, written = chat
    assert talk.handle("Where is the dog?")
    assert talk.latest is not None
    assert "".join(written).rstrip(". \n") == talk.latest.text.rstrip(". \n")
    assert len(written) > 2  # in pieces
    talk.handle("And the cat?")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[2]["content"] == "And the cat?"


def test_weights_and_strength_hold_from_the_next_answer_on(chat: tuple[Chat, list[str]]) -> None:
    talk, _ = chat
    talk.handle("/weights dialogue=0.7, positive=0.3")
    assert talk.weights == {"positive": 0.3, "dialogue": 0.7}
    talk.handle("/kl 0.5")
    assert (talk.target_kl, talk.beta) == (0.5, None)
    talk.handle("/beta 8")
    assert (talk.target_kl, talk.beta) == (None, 8.0)
    talk.handle("/plain")
    talk.handle("Where is the dog?")
    assert talk.latest is not None
    assert talk.latest.spent == 0.0


def test_the_last_message_is_answered_again_in_place(chat: tuple[Chat, list[str]]) -> None:
    talk, _ = chat
    talk.handle("Where is the dog?")
    first = talk.messages[:1]
    talk.handle("/again")
    assert talk.messages[:1] == first
    assert len(talk.messages) == 2
    talk.handle("/reset")
    assert talk.messages == []


def test_it_shows_where_the_budget_went(chat: tuple[Chat, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    talk, _ = chat
    talk.handle("Where is the dog?")
    talk.handle("/show")
    assert talk.latest is not None
    shown = capsys.readouterr().out
    assert f"{talk.latest.spent:.2f} nats spent on {len(talk.latest.kl)} tokens" in shown


def test_a_system_message_is_part_of_every_prompt(
    chat: tuple[Chat, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, _ = chat
    asked: list[Any] = []

    def record(policy: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        asked.extend(prompts)
        return respond(policy, tokenizer, prompts, **options)

    monkeypatch.setattr("mavis.decoding.respond", record)
    talk.system = "Be kind."
    talk.handle("Where is the dog?")
    talk.handle("And the cat?")
    assert [message["role"] for message in asked[1]] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/wieghts positive=1", "there is no command '/wieghts'. Hint: did you mean '/weights'"),
        ("/weights positve=1", "/weights names objective 'positve'. Hint: did you mean 'positive'"),
        ("/weights positive", "/weights got '', expected a number"),
        ("/kl much", "/kl got 'much', expected a number"),
        ("/kl -1", "target_kl is -1"),
        ("/kl nan", "target_kl is nan"),
        ("/beta -2", "beta is -2"),
        ("/weights positive=inf", "weights"),
        ("/again", "/again has nothing to answer yet"),
        ("/show", "/show has nothing to show yet"),
    ],
)
def test_a_slip_is_told_and_changes_nothing(chat: tuple[Chat, list[str]], line: str, message: str) -> None:
    talk, _ = chat
    with pytest.raises(MavisError, match=message.replace("?", r"\?")):
        talk.handle(line)
    assert talk.weights == {"positive": 1.0, "dialogue": 0.0}
    assert (talk.beta, talk.target_kl) == (3.0, None)


def test_a_budget_out_of_reach_leaves_the_conversation_as_it_was(chat: tuple[Chat, list[str]]) -> None:
    talk, _ = chat
    talk.handle("/kl 1000")
    with pytest.raises(MavisError, match="target_kl is 1000"):
        talk.handle("Where is the dog?")
    assert talk.messages == []


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    shutil.copytree(embedded.path(), tmp_path / "chat-model", ignore=shutil.ignore_patterns("critic", "*.py"))
    (tmp_path / "chat-model" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    assert load_policy(tmp_path / "chat-model")[1].chat_template == TEMPLATE
    return tmp_path / "chat-model"


def test_the_command_talks_until_the_input_ends(mavis: Any, chat_model: Path) -> None:
    shared = ("policy=pretrained", f"policy.path={chat_model}", f"checkpoint={embedded.critic_path()}")
    lines = "/help\n/weights dialogue=1\n\nWho is there?\n/kl\n/show\n/quit\nnot read\n"
    ran = mavis("chat", *shared, "decoding.max_new_tokens=8", stdin=lines)
    assert ran.code == 0, ran.err
    assert all(name in ran.out for name in COMMANDS)
    assert "weights positive 0, dialogue 1\n" in ran.out
    assert "/kl got '', expected a number. Hint: " in ran.out
    assert " nats spent on " in ran.out


def test_a_policy_without_a_template_is_refused(mavis: Any) -> None:
    ran = mavis("chat", "policy=embedded", f"checkpoint={embedded.critic_path()}", stdin="")
    assert ran.code == 2
    assert "has no chat template. Hint: choose a chat model, such as policy=smollm2." in ran.err
