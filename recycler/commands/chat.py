"""`recycle chat`: a conversation in the terminal, each token in the colour of who made it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from recycler.options import as_text, on_device, with_base
from recycler.zoo.errors import RecycleError, UsageError, choices, counted
from recycler.zoo.untrusted import OBEYED, printable

if TYPE_CHECKING:
    from recycler.chatting import Answer, Chat, Piece

COMMANDS = {
    "/help": "these lines",
    "/reset": "forget what was said; the system text stays",
    "/only NAME": "this adapter alone answers from now on",
    "/base": "the bare base answers",
    "/routed": "the router chooses again",
    "/explain": "the last answer's shares, layer by layer",
    "/system TEXT": "say this before everything; without TEXT say nothing",
    "/exit": "leave; so does Ctrl-D",
}
MORE = (
    "Ctrl-C stops an answer.",
    "A \\ at the end of a line goes on in the next; // begins a message with a /.",
)
_PALETTE = (
    "cyan",
    "yellow",
    "magenta",
    "green",
    "blue",
    "red",
    "bright_cyan",
    "bright_yellow",
    "bright_magenta",
    "bright_green",
)
_NAMED = 4  # adapters in a line of shares
_ROWS = 12  # adapters in a terminal's table of layers
_COLUMNS = 8  # adapters in a table of layers that is piped


@click.command(name="chat")
@click.argument("model_path", metavar="MODEL")
@click.option("--system", metavar="TEXT", help="Said before everything.")
@click.option("--only", "only_adapter", metavar="ADAPTER", help="Use this adapter alone; `base` for none.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 for the likeliest answer.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of answers that are drawn, with a temperature above 0.")
@click.option("--plain", is_flag=True, help="Turns as `Instruction: … Response: …`, even where the base has a chat template.")
@with_base
@on_device
def chat_command(
    model_path: str, system: str | None, only_adapter: str | None, max_new_tokens: int, temperature: float, seed: int, plain: bool,
    base: str | None, device: str | None, dtype: str,
) -> None:  # fmt: skip
    """Talk to a composed model, and see who fires.

    Each token has the colour of the adapter that dominates it, and under each answer stand the shares, with the router's reason
    where it says one. /help lists what else can be typed. Without a terminal every line of stdin is a message or a command,
    answers go to stdout and shares to stderr. A base without a chat template gets plain turns: `Instruction: …`, and `Response:`
    on the next line.

    \b
    Examples:
      recycle chat model/
      recycle chat model/ --only math-lora --system "Answer in one word."
      recycle chat model/ --temperature 0.7 --seed 1 < messages.txt > answers.txt
    """
    from recycler.chatting import Chat, unseen
    from recycler.composition import load
    from recycler.terminal import complain, say

    model = load(model_path, base=base, device=device, dtype=dtype)
    for warning in filter(None, [*model.warnings, "" if plain else unseen(model)]):
        say(f"warning: {warning}")
    chat = Chat(
        model, system=system, only=only_adapter, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        template=not plain,
    )  # fmt: skip
    alive = sys.stdin.isatty()
    if alive:
        router = "no router" if model.router is None else model.router.method()
        say(f"{counted(len(model.names), 'adapter')} on {printable(model.source.id)}, {router}. /help says what can be typed.")
    screen = _Screen(model.names)
    for line in _typed(model.names) if alive else _piped():
        try:
            if line.startswith("/") and not line.startswith("//"):
                if not _obey(chat, line, screen):
                    break
            else:
                with _stoppable(alive) as stop:
                    answer = chat.ask(line[1:] if line.startswith("//") else line, on_piece=screen.piece, stop=stop)
                screen.finish(answer)
        except RecycleError as error:
            if not alive:  # a script is to notice
                raise
            complain(error)
        except KeyboardInterrupt:
            if not alive:
                raise
            say("\nstopped at once; nothing of it is kept")


def _obey(chat: Chat, line: str, screen: _Screen) -> bool:
    """Does what a command says; False where it is time to leave."""
    from recycler.terminal import say

    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command in ("/exit", "/quit"):
        return False
    if command == "/help":
        for name, what in COMMANDS.items():
            say(f"  {name:<13} {what}")
        for line in MORE:
            say(f"  {line}")
    elif command == "/reset":
        chat.reset()
        say("forgotten")
    elif command in ("/only", "/base", "/routed"):
        if command == "/only" and not rest:
            raise UsageError("/only needs a name.", "", f"Choose {choices(chat.model.names)}.")
        chat.use(rest if command == "/only" else "base" if command == "/base" else None)
        say({None: "the router chooses", "base": "the bare base answers"}.get(chat.only, f"{chat.only} answers"))
    elif command == "/system":
        chat.system = rest or None
        say("said before everything" if rest else "nothing is said before")
    elif command == "/explain":
        screen.layers(chat)
    else:
        names = ", ".join(name.partition(" ")[0] for name in COMMANDS)
        raise UsageError(
            f"There is no command {printable(command, 40)}.", f"There are {names}.", "Begin a message with // for a /."
        )
    return True


class _Screen:
    """Answers on stdout as they are made, shares on stderr."""

    def __init__(self, names: Sequence[str]) -> None:
        from rich.console import Console

        self.names = [OBEYED.sub("", name) for name in names]
        self.out, self.err = Console(highlight=False), Console(stderr=True, highlight=False)
        self.colours: dict[int, str] = {}  # given out as adapters appear: of a zoo of hundreds few do
        self.begun = False

    def colour(self, number: int | None) -> str:
        if number is None:
            return ""
        return self.colours.setdefault(number, _PALETTE[len(self.colours) % len(_PALETTE)])

    def piece(self, piece: Piece) -> None:
        from recycler.chatting import leader

        text = OBEYED.sub("", piece.text)
        if not self.begun:  # the space between a prompt and its answer
            text = text.lstrip()
            self.begun = bool(text)
        if text and self.out.is_terminal:
            self.out.out(text, style=self.colour(leader(piece.shares)), end="", highlight=False)
        elif text:
            click.echo(text, nl=False)
        sys.stdout.flush()

    def finish(self, answer: Answer) -> None:
        from rich.text import Text

        click.echo()
        self.begun = False
        notes = ["stopped"] * answer.stopped
        if answer.forgotten:
            notes.append(f"the oldest {answer.forgotten} turns no longer fit, and are forgotten")
        line = Text("  ")
        for number, (name, share, who) in enumerate(self.shares(answer.shares)):
            line.append(", " if number else "")
            line.append(name, style=self.colour(who))
            line.append(f" {share:.0%}")
        if answer.why:
            line.append(f"  because {printable(as_text(_short(answer.why)), 200)}", style="dim")
        line.append("".join(f"  ({note})" for note in notes), style="dim")
        self.err.print(line, soft_wrap=True)

    def shares(self, shares: Sequence[float]) -> list[tuple[str, float, int | None]]:
        """(name, share, number) of the largest ones, of all the others, and of the base."""
        order = self.order(shares)
        found: list[tuple[str, float, int | None]] = [(self.names[e], shares[e], e) for e in order[:_NAMED]]
        if order[_NAMED:]:
            found.append((f"{len(order) - _NAMED} more", sum(shares[e] for e in order[_NAMED:]), None))
        if 1 - sum(shares) >= 5e-3:
            found.append(("base", 1 - sum(shares), None))
        return found

    def layers(self, chat: Chat) -> None:
        """The last answer's shares by layer, those who have most first."""
        from recycler.terminal import say, table

        if chat.last is None:
            raise UsageError("There is no answer to explain yet.", "", "Ask something first.")
        if not chat.last.layers:
            raise UsageError(
                "The bare base made the last answer.", "No adapter had a share.", "/routed brings the router back."
            )
        shares = chat.last.shares
        order = self.order(shares)
        if self.out.is_terminal:  # where columns for names are dear
            from recycler.commands.explain import blocks

            layers, shown = chat.last.layers.values(), order[:_ROWS]
            room = self.out.width - max(map(len, ["adapter", *(self.names[e] for e in shown)])) - len("  share  ")
            most = min(max(room, 8), 48)
            lines = [[self.names[e], f"{shares[e]:.0%}", blocks([row[e] for row in layers], most)] for e in shown]
            lines.append(["base", f"{abs(1 - sum(shares)):.0%}", blocks([1 - sum(row) for row in layers], most)])
            table(["adapter", "share", "by layer, first to last" if most > 22 else "by layer"], lines, right=1)
            if len(order) > len(shown):
                say(f"the {len(shown)} largest of {len(order)}")
            return
        shown = order[:_COLUMNS]
        rows = [
            [layer, *(f"{row[e]:.2f}" for e in shown), f"{round(1 - sum(row), 2) + 0.0:.2f}"]  # no -0.00
            for layer, row in chat.last.layers.items()
        ]
        table(["layer", *(self.names[e] for e in shown), "base"], rows, right=1)
        if len(order) > len(shown):
            say(f"the {len(shown)} largest of {len(order)}")

    def order(self, shares: Sequence[float]) -> list[int]:
        """The numbers of those who have a share, largest first."""
        return sorted((e for e in range(len(shares)) if abs(shares[e]) >= 5e-3), key=lambda e: -abs(shares[e]))


def _short(why: Any) -> Any:
    """A reason for one line: numbers with two places, no long texts."""
    if isinstance(why, dict):
        return {key: _short(value) for key, value in why.items()}
    if isinstance(why, (list, tuple)):
        return [_short(value) for value in why]
    return f"{why:.2f}" if isinstance(why, float) else printable(why, 40) if isinstance(why, str) else why


def _piped() -> Iterator[str]:
    """Messages, one a line, but for those that end in a backslash."""
    with suppress(AttributeError):
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    yield from _joined(iter(sys.stdin))


def _typed(names: Sequence[str]) -> Iterator[str]:
    """What a person types, with a history, and with Tab for commands and names where the system has readline."""
    with suppress(ImportError):
        import readline

        commands = [name.partition(" ")[0] + (" " if " " in name else "") for name in COMMANDS]

        def complete(begun: str, number: int) -> str | None:
            typed = readline.get_line_buffer()
            words = names if typed.startswith("/only ") else commands if typed.startswith("/") else []
            fitting = [word for word in words if word.startswith(begun)]
            return fitting[number] if number < len(fitting) else None

        readline.set_completer_delims(" ")
        readline.set_completer(complete)
        readline.parse_and_bind("tab: complete")

    def lines() -> Iterator[str]:
        while True:
            try:
                yield input("› " if sys.stdout.isatty() else "")
            except EOFError:
                click.echo(err=True)
                return
            except KeyboardInterrupt:
                click.echo("\nCtrl-D leaves", err=True)

    yield from _joined(lines())


def _joined(lines: Iterator[str]) -> Iterator[str]:
    held = ""
    for line in lines:
        line = line.rstrip("\r\n")
        if line.endswith("\\"):
            held += line[:-1] + "\n"
            continue
        whole, held = (held + line).strip(), ""
        if whole:
            yield whole
    if held.strip():
        yield held.strip()


@contextmanager
def _stoppable(alive: bool) -> Iterator[Callable[[], bool]]:
    """While it lasts, the first Ctrl-C ends the answer after the token that is being made, and only the second interrupts."""
    asked: list[int] = []
    if not alive:
        yield lambda: False
        return

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
