"""`mavis chat`: a conversation in the terminal whose preference weights can be changed at any turn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mavis.cli.build import load_critic, load_policy, plain
from mavis.cli.console import print_table, terminal_text
from mavis.cli.hydra_app import hydra_app
from mavis.decoding.settings import check_settings
from mavis.decoding.weights import weight_rows
from mavis.errors import ConfigError, MavisError, closest

if TYPE_CHECKING:
    from mavis.critics import Critic
    from mavis.decoding import Response

COMMANDS = {
    "/weights": "preference weights, such as /weights helpful=0.7 brevity=0.3",
    "/kl": "KL budget in nats per response, such as /kl 3",
    "/beta": "strength of the tilt instead of a budget, such as /beta 4",
    "/plain": "answer without the tilt, until other weights are chosen",
    "/again": "answer the last message again, with the weights of now",
    "/show": "what the tilt did to the last answer",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "leave; so does the end of the input",
}
_SHOWN_TOKENS = 10


@dataclass
class Chat:
    """A conversation and the preferences that it is answered under.

    Args:
        policy: a chat model.
        tokenizer: its tokenizer, with a chat template.
        critic: steers the policy.
        decoding: a `decoding` group: `max_new_tokens`, `top_k` and `temperature`.
        weights: by objective.
        beta: strength; None takes `target_kl`, or the critic's calibrated default.
        target_kl: KL budget in nats per response.
        system: a system message; None has none.
        write: prints a text as it comes.
    """

    policy: Any
    tokenizer: Any
    critic: Critic
    decoding: dict[str, Any]
    weights: dict[str, float]
    beta: float | None = None
    target_kl: float | None = None
    system: str | None = None
    write: Callable[[str], None] = lambda text: print(terminal_text(text), end="", flush=True)
    messages: list[dict[str, str]] = field(default_factory=list)
    latest: Response | None = None

    def handle(self, line: str) -> bool:
        """Handle a line of the user's: a command, or a message that is answered.

        Args:
            line: what the user typed.

        Returns:
            Whether the conversation goes on.

        Raises:
            MavisError: if a command cannot be carried out; the conversation is as before.
        """
        command, _, argument = line.strip().partition(" ")
        if command == "/quit":
            return False
        if command.startswith("/"):
            if command not in COMMANDS:
                raise ConfigError(f"there is no command {command!r}.", closest(command, COMMANDS))
            getattr(self, f"_{command[1:]}")(argument.strip())
        elif line.strip():
            self._answer([*self.messages, {"role": "user", "content": line.strip()}])
        return True

    def _answer(self, messages: list[dict[str, str]]) -> None:
        """Answer a conversation that ends with the user's turn, and keep both."""
        from mavis.decoding import respond

        asked = [{"role": "system", "content": self.system}, *messages] if self.system else messages
        [[response]] = respond(
            self.policy,
            self.tokenizer,
            [asked],
            critic=self.critic,
            weights=self.weights,
            beta=self.beta,
            target_kl=self.target_kl,
            streamer=_Streamer(self.tokenizer, self.write),
            **self.decoding,
        )
        self.write("\n" if response.finished else " ...\n")
        self.latest = response
        self.messages = [*messages, {"role": "assistant", "content": response.text.strip() or "..."}]

    def _weights(self, argument: str) -> None:
        weights = {}
        for part in argument.replace(",", " ").split():
            name, _, number = part.partition("=")
            if name not in self.critic.objectives:
                raise ConfigError(f"/weights names objective {name!r}.", closest(name, self.critic.objectives))
            weights[name] = _number("/weights", number)
        if argument:
            weight_rows(weights, self.critic.objectives)
            self.weights = dict.fromkeys(self.critic.objectives, 0.0) | weights
        self.write(f"weights {_shown(self.weights)}\n")

    def _kl(self, argument: str) -> None:
        target_kl = _number("/kl", argument)
        check_settings(None, target_kl, None, 1.0)
        self.target_kl, self.beta = target_kl, None
        self.write(f"a budget of {self.target_kl:g} nats per response\n")

    def _beta(self, argument: str) -> None:
        beta = _number("/beta", argument)
        check_settings(beta, None, None, 1.0)
        self.beta, self.target_kl = beta, None
        self.write(f"beta {self.beta:g}\n")

    def _plain(self, argument: str) -> None:
        self.weights = dict.fromkeys(self.critic.objectives, 0.0)
        self.write("answering without the tilt\n")

    def _again(self, argument: str) -> None:
        if not self.messages:
            raise ConfigError("/again has nothing to answer yet.", "write a message first.")
        self._answer(self.messages[:-1])

    def _show(self, argument: str) -> None:
        if self.latest is None:
            raise ConfigError("/show has nothing to show yet.", "write a message first.")
        steps = sorted(enumerate(self.latest.kl), key=lambda step: -step[1])[:_SHOWN_TOKENS]
        tokens = [repr(self.tokenizer.decode(token)) for token in self.latest.token_ids]
        print_table(
            f"{self.latest.spent:.2f} nats spent on {len(tokens)} tokens; most of it where these were chosen",
            [{"position": at, "token": tokens[at], "nats": nats} for at, nats in sorted(steps)],
        )

    def _reset(self, argument: str) -> None:
        self.messages, self.latest = [], None
        self.write("the conversation begins anew\n")

    def _help(self, argument: str) -> None:
        width = max(map(len, COMMANDS))
        self.write("".join(f"  {name:<{width}}  {text}\n" for name, text in COMMANDS.items()))


class _Streamer:
    """Writes a response word by word while it is drawn; what `generate` calls a streamer."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] | None = None  # None until the prompt has passed
        self._written = 0

    def put(self, value: Any) -> None:
        """Take the prompt's tokens, and after it each token that is drawn."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half of a character
            self._write(text[self._written :])
            self._written = len(text)

    def end(self) -> None:
        """Do nothing: everything is written."""


def _number(command: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{command} got {text!r}, expected a number.", COMMANDS[command] + ".") from None


def _shown(weights: dict[str, float]) -> str:
    return ", ".join(f"{name} {weight:g}" for name, weight in weights.items())


def _converse(chat: Chat) -> None:
    """Read lines and handle them until the user leaves."""
    going = True
    while going:
        try:
            going = chat.handle(input("> " if sys.stdin.isatty() else ""))
        except EOFError:
            return
        except KeyboardInterrupt:  # stops an answer; the conversation goes on without it
            chat.write("\n")
        except MavisError as error:
            chat.write(f"{error}\n")


def _run(config: Any) -> None:
    critic = load_critic(config.checkpoint)
    weights = plain(config.weights) or dict.fromkeys(critic.objectives, 1 / len(critic.objectives))
    policy, tokenizer = load_policy(config.policy)
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"policy.path is {config.policy.path!r}, whose tokenizer has no chat template.",
            "choose a chat model, such as policy=smollm2.",
        )
    chat = Chat(
        policy,
        tokenizer,
        critic,
        plain(config.decoding),
        dict.fromkeys(critic.objectives, 0.0) | dict(weights),
        beta=config.beta,
        target_kl=config.target_kl,
        system=config.system,
    )
    chat.write(f"weights {_shown(chat.weights)}; /help lists what you can change\n")
    with critic.attach(policy):
        _converse(chat)


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("chat")(_run)()


if __name__ == "__main__":
    main()
