"""A conversation with a routed model: what is answered, who is said to have fired, and the terminal it happens in."""

from __future__ import annotations

import io
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import Pico
from torch import Tensor
from way import Way

import recycler
from recycler.chatting import STOP, Answer, Chat, Piece, leader, plain
from recycler.cli import main
from recycler.commands import chat
from recycler.routed import RoutedModel
from recycler.zoo.errors import UsageError

ASKED = ["Add 1 and b.", "O 3 of the long, long poem!"]


@pytest.fixture(scope="module")
def model(way: Way) -> RoutedModel:
    return recycler.load(way.folder)


@pytest.fixture(scope="module")
def deciding(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A composed model whose router decides once a sequence."""
    folder, zoo = tmp_path_factory.mktemp("deciding"), recycler.Zoo(llama.zoo)
    profile = recycler.profile(zoo, shots=recycler.Shots.from_files(*llama.tasks), kshot=2, out=folder / "p2")
    router = recycler.build_router("retrieval", profile, zoo=zoo, out=folder / "gates")
    recycler.compose(zoo, router, folder / "model").engine.detach()
    return folder / "model"


@pytest.fixture(scope="module")
def quick(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A composed model that loads without a sentence encoder, for processes."""
    folder, zoo = tmp_path_factory.mktemp("quick") / "model", recycler.Zoo(llama.zoo)
    recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo), folder).engine.detach()
    return folder


def templated(model: RoutedModel, *messages: str, system: str | None = None) -> dict[str, Tensor]:
    """Inputs of a conversation, by the tokenizer's own template; user and assistant take turns."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    turns = [*([{"role": "system", "content": system}] if system else []), *turns]
    text = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return dict(model.tokenizer(text, add_special_tokens=False, return_tensors="pt"))


def generated(model: RoutedModel, inputs: dict[str, Tensor], new: int) -> Tensor:
    start = 0 if model.source.encoder_decoder else inputs["input_ids"].shape[1]
    with torch.no_grad():
        ids: Tensor = model.generate(**inputs, max_new_tokens=new, do_sample=False)[0]
    return ids[start:]


def text_of(model: RoutedModel, ids: Tensor) -> str:
    return str(model.tokenizer.decode(ids, skip_special_tokens=True))


# -------------------------------------------------------------------------------------------------------------- the session


def test_answers_are_those_of_generate_on_the_templated_conversation(model: RoutedModel) -> None:
    chat = Chat(model, max_new_tokens=9, system="Be brief.")
    said: list[str] = []
    for message in ASKED:
        shown: list[Piece] = []
        answer = chat.ask(message, on_piece=shown.append)
        expected = text_of(model, generated(model, templated(model, *said, message, system="Be brief."), 9))
        assert answer.text == expected.strip() and "".join(piece.text for piece in shown) == expected
        said += [message, answer.text]
    assert [content for _, content in chat.turns] == said and [role for role, _ in chat.turns] == ["user", "assistant"] * 2
    chat.reset()
    assert chat.turns == [] and chat.last is None
    assert chat.ask(ASKED[0]).text == said[1]  # the system text is still there


def test_shares_are_weights_for_on_the_final_sequence(model: RoutedModel) -> None:
    """Each token's are those of the position that it was predicted from; layers and the whole are means of them."""
    answer = Chat(model, max_new_tokens=7).ask(ASKED[1])
    inputs = templated(model, ASKED[1])
    new = generated(model, inputs, 7)
    if model.source.encoder_decoder:  # generate returns the start token too
        firing = model.weights_for({**inputs, "decoder_input_ids": new[None]})
        stream = {site: group.stream for group in model.engine.groups for site in group.sites}
        sites = {site: w_BTE[0, :-1] for site, w_BTE in firing.sites.items() if stream[site] == "target"}
    else:
        start = inputs["input_ids"].shape[1]
        firing = model.weights_for({"input_ids": torch.cat([inputs["input_ids"], new[None]], 1)})
        sites = {site: w_BTE[0, start - 1 : -1] for site, w_BTE in firing.sites.items()}
    mean_NE = torch.stack([*sites.values()]).mean(0)
    shares_NE = torch.tensor([piece.shares for piece in answer.pieces])
    assert shares_NE.shape == (7, 4) and torch.allclose(shares_NE, mean_NE, atol=1e-4)
    assert model.source.encoder_decoder or shares_NE.std(0).max() > 1e-3  # tokens differ
    assert torch.allclose(torch.tensor(answer.shares), mean_NE.mean(0), atol=1e-4)
    for layer in ("0", "1"):
        own = [w_NE.mean(0) for site, w_NE in sites.items() if re.search(rf"(block|layers)\.{layer}\.", site)]
        assert torch.allclose(torch.tensor(answer.layers[layer]), torch.stack(own).mean(0), atol=1e-4)
    assert list(answer.layers) == ["0", "1"] and answer.why is None


def test_who_decides_once_decides_on_the_whole_conversation(deciding: Path) -> None:
    model = recycler.load(deciding)
    assert model.router is not None
    chat, said = Chat(model, max_new_tokens=3), []
    messages = ["O 3 of the long, long poem!", "And?"]
    decided = []
    for message in messages:
        answer = chat.ask(message)
        inputs = templated(model, *said, message)
        with model.planned(inputs) as plan:
            assert answer.why == (model.router.explain(plan) or [None])[0] is not None
            weights_E = plan.weights_BE[0]
        assert torch.allclose(torch.tensor([piece.shares for piece in answer.pieces]), weights_E.expand(3, 4), atol=1e-6)
        said += [message, answer.text]
        decided.append(weights_E)
    with model.planned(templated(model, messages[1])) as alone:
        assert not torch.equal(alone.weights_BE[0], decided[1])  # what was said before counts


def test_one_adapter_and_the_base(model: RoutedModel) -> None:
    chat = Chat(model, only="code", max_new_tokens=5)
    inputs = templated(model, ASKED[0])
    with model.only("code"):
        assert chat.ask(ASKED[0]).text == text_of(model, generated(model, inputs, 5)).strip()
    assert chat.last is not None and chat.last.shares == (1.0, 0.0, 0.0, 0.0) and leader(chat.last.shares) == 0
    chat.reset()
    chat.use("base")
    with model.disabled():
        assert chat.ask(ASKED[0]).text == text_of(model, generated(model, inputs, 5)).strip()
    assert chat.last.shares == (0.0,) * 4 and leader(chat.last.shares) is None and chat.last.layers == {}
    with pytest.raises(UsageError, match=r"no adapter 'prose'.*code, law, math, poem"):
        chat.use("prose")
    assert chat.only == "base"


def test_leader() -> None:
    assert leader((0.2, 0.5, 0.3)) == 1 and leader((0.1, 0.3)) is None and leader((0.1, -0.9)) is None and leader(()) is None
    assert leader((0.1, 0.6)) == 1 and leader((1.2, 0.3)) == 0


def test_what_is_drawn_depends_on_the_seed_alone(model: RoutedModel) -> None:
    def drawn(seed: int, temperature: float = 5.0) -> str:
        torch.rand(1)  # the state of torch's own generator does not matter
        return Chat(model, temperature=temperature, seed=seed, max_new_tokens=8).ask(ASKED[0]).text

    assert drawn(1) == drawn(1) and len({drawn(1), drawn(2), drawn(1, 0.0)}) == 3
    chat = Chat(model, temperature=5.0, seed=1, max_new_tokens=8)
    first = chat.ask(ASKED[0])
    chat.turns = []
    assert chat.ask(ASKED[0]).text == first.text


def test_an_answer_that_is_stopped_stays_and_the_conversation_goes_on(model: RoutedModel) -> None:
    chat, seen = Chat(model, max_new_tokens=50), []
    answer = chat.ask(ASKED[0], on_piece=seen.append, stop=lambda: len(seen) == 3)
    assert answer.stopped and len(answer.pieces) == 3 and chat.turns == [("user", ASKED[0]), ("assistant", answer.text)]
    chat.max_new_tokens = 3
    assert (
        chat.ask(ASKED[1]).text
        == text_of(model, generated(model, templated(model, ASKED[0], answer.text, ASKED[1]), 3)).strip()
    )

    def fail(piece: Piece) -> None:
        raise KeyboardInterrupt

    before = list(chat.turns)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("and", on_piece=fail)
    assert chat.turns == before and model.engine.control.record is None and model.engine.control.plan is None


def test_plain_turns() -> None:
    turns = [("system", "Be brief."), ("user", "What is 417 + 85?"), ("assistant", "502"), ("user", "And in words?")]
    assert plain(turns) == "Be brief.\n\nInstruction: What is 417 + 85?\nResponse: 502\n\nInstruction: And in words?\nResponse:"


def test_without_a_chat_template(way: Way, model: RoutedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain turns, asked for or for want of a template; an answer ends where the next question would begin."""
    wanted = plain([("user", ASKED[0])])
    expected = text_of(model, generated(model, dict(model.tokenizer(wanted, return_tensors="pt")), 40))
    assert Chat(model, max_new_tokens=40, template=False).ask(ASKED[0]).text == expected.split(STOP)[0].strip()
    bare = recycler.load(way.folder)
    bare.tokenizer.chat_template = None
    shown: list[Piece] = []
    assert Chat(bare, max_new_tokens=40).ask(ASKED[0], on_piece=shown.append).text == expected.split(STOP)[0].strip()
    ends = expected[3:6]  # any text that does come
    monkeypatch.setattr("recycler.chatting.STOP", ends)
    shown.clear()
    cut = Chat(bare, max_new_tokens=40).ask(ASKED[0], on_piece=shown.append)
    assert "".join(piece.text for piece in shown) == expected.split(ends)[0] and cut.text == expected.split(ends)[0].strip()
    assert not cut.stopped and len(cut.pieces) < 20


def test_what_no_longer_fits_is_forgotten(llama: Pico, deciding: Path) -> None:
    """The pico base reads 512 bytes."""
    chat = Chat(recycler.load(deciding), max_new_tokens=4)
    for _ in range(2):
        assert chat.ask("x" * 200).forgotten == 0
    answer = chat.ask("y" * 200)
    assert answer.forgotten == 2 and [content[0] for role, content in chat.turns if role == "user"] == ["x", "y"]
    with pytest.raises(UsageError, match=r"too long: 7\d\d tokens.*reads 512"):
        chat.ask("z" * 700)
    assert len(chat.turns) == 4
    chat.reset()
    almost = chat.ask("z" * 485)  # the template adds some
    assert almost.forgotten == 0 and len(almost.pieces) <= 4


@pytest.mark.parametrize("message", ["", " \n", "half \ud83d"])
def test_messages_that_are_no_text(model: RoutedModel, message: str) -> None:
    with pytest.raises(UsageError, match="cannot be used"):
        Chat(model).ask(message)


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"only": "prose"}]
)
def test_options_that_make_no_sense(model: RoutedModel, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Chat(model, **options)


# -------------------------------------------------------------------------------------------------------------- the command


def command(*args: Any) -> list[str]:
    return [sys.executable, "-m", "recycler.cli", "chat", *map(str, args)]


def piped(*args: Any, stdin: str | bytes) -> subprocess.CompletedProcess[str]:
    given = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run(command(*args), input=given, capture_output=True, check=False)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_script(quick: Path) -> None:
    """Answers alone on stdout, in plain text; shares and what commands say on stderr."""
    model = recycler.load(quick)
    chat = Chat(model, max_new_tokens=4)
    lines = [
        ASKED[0],
        "",
        "/only code",
        "two\\",
        "lines",
        "/explain",
        "/base",
        "//x",
        "/routed",
        "/system Be brief.",
        "/reset",
        ASKED[1],
    ]
    done = piped(quick, "--max-new-tokens", 4, stdin="\n".join([*lines, "/exit", "never reached"]) + "\n")
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr, done.stderr
    first = chat.ask(ASKED[0])
    chat.use("code")
    second = chat.ask("two\nlines")
    table = [f"layer\t{'code'}\t", "0\t1.00\t0.00", "1\t1.00\t0.00"]
    chat.use("base")
    third = chat.ask("/x")
    chat = Chat(model, max_new_tokens=4, system="Be brief.")
    fourth = chat.ask(ASKED[1])
    shown = [re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", "", answer.text) for answer in (first, second, third, fourth)]
    at = [done.stdout.find(text) for text in [shown[0], shown[1], *table, shown[2], shown[3]]]
    assert all(place >= 0 for place in at), done.stdout
    said = [line.strip() for line in done.stderr.splitlines()]
    shares = [line for line in said if "%" in line]
    best = leader(first.shares)
    assert best is not None
    top = f"{model.names[best]} {first.shares[best]:.0%}"
    assert len(shares) == 4 and shares[0].startswith(top) and shares[1] == "code 100%" and shares[2] == "base 100%"
    assert [line for line in said if line in ("code answers", "the bare base answers", "the router chooses", "forgotten")] == [
        "code answers", "the bare base answers", "the router chooses", "forgotten",
    ]  # fmt: skip


def test_scripts_notice_mistakes(deciding: Path) -> None:
    for line, message in (
        ("/prose", "There is no command /prose."),
        ("/only prose", "There is no adapter 'prose'"),
        ("/only", "Choose one of: code, law, math, poem"),
        ("/explain", "There is no answer to explain yet."),
        ("x" * 600, "too long"),
    ):
        result = CliRunner().invoke(main, ["chat", str(deciding)], input=f"{line}\n{ASKED[0]}\n")
        assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
    for options in (["--temperature", "-1"], ["--max-new-tokens", "0"], ["--only", "prose"]):
        assert CliRunner().invoke(main, ["chat", str(deciding), *options], input="").exit_code == 2
    helped = CliRunner().invoke(main, ["chat", str(deciding)], input="/help\n")
    assert helped.exit_code == 0 and helped.stdout == "" and "/system TEXT" in helped.stderr
    broken = CliRunner().invoke(main, ["chat", str(deciding), "--max-new-tokens", "1"], input=b"\xff\xfe?\n")
    assert broken.exit_code == 0 and "%" in broken.stderr


class Terminal:
    """A process in a pseudo-terminal."""

    def __init__(self, args: list[str], **env: str) -> None:
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(args[0], args, {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **env})
        self.raw, self.at = b"", 0

    @property
    def seen(self) -> str:
        return self.raw.decode("utf8", "replace")

    def read(self, until: str | None = None, again: str = "") -> str:
        """What comes next, up to `until`, or to the end. `again` is sent once more for each second that brings nothing."""
        begin, limit = self.at, time.monotonic() + 60
        while until is None or (found := self.raw.find(until.encode(), begin)) < 0:
            assert time.monotonic() < limit, self.seen
            if not select.select([self.fd], [], [], 1)[0]:
                self.send(again)
                continue
            try:
                new = os.read(self.fd, 1 << 16)
            except OSError:  # Linux says so where a terminal has ended
                new = b""
            if not new:
                assert until is None, self.seen
                return self.raw[begin:].decode("utf8", "replace")
            self.raw += new
        self.at = found + len(until.encode())
        return self.raw[begin : self.at].decode("utf8", "replace")

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def leave(self) -> int:
        self.read()
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_in_a_terminal(quick: Path) -> None:
    """Colours, an answer that Ctrl-C stops while the program lives, a mistake that does not end it, and Ctrl-D."""
    terminal = Terminal(command(quick, "--max-new-tokens", 470))
    assert "4 adapters on" in terminal.read("› ")
    terminal.send("/only code\n")
    terminal.read("code answers")
    terminal.read("› ")
    terminal.send("a\n")
    terminal.read("\x1b[36m")  # the first token, in the first colour
    terminal.send("\x03")
    assert "(stopped)" in terminal.read("› ")
    terminal.send("/explain\n")
    assert re.search(r"by layer, first to last.*code +100% +██", terminal.read("› "), re.DOTALL)
    terminal.send("/prose\n")
    assert "There is no command /prose." in terminal.read("› ")
    terminal.send("\x03")  # Python's input() does not see one that comes between its prompt and its wait, before the next key
    assert "Ctrl-D leaves" in terminal.read("› ", again="\x03")
    terminal.send("\x04")
    assert terminal.leave() == 0 and "Traceback" not in terminal.seen
    assert "code" in re.sub(r"\x1b\[[\d;]*m", "", terminal.seen)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_keys_in_a_narrow_terminal(quick: Path) -> None:
    """Tab completes commands and names, an arrow brings back what was typed, and a table is as wide as the terminal."""
    import fcntl
    import struct
    import termios

    pytest.importorskip("readline")
    terminal = Terminal(command(quick, "--max-new-tokens", 3), COLUMNS="30", NO_COLOR="1")
    fcntl.ioctl(terminal.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 30, 0, 0))
    terminal.read("› ")
    terminal.send("/on\tpo\t\n")
    terminal.read("poem answers")
    terminal.read("› ")
    terminal.send("שלום é\n")
    assert "poem 100%" in terminal.read("› ")
    terminal.send("/expl\t\n")
    shown = re.sub(r"\x1b\[[\d;]*m", "", terminal.read("› "))  # bold it may be
    assert "by layer" in shown and all(len(line) <= 30 for line in shown.replace("\r", "").split("\n"))
    assert "\x1b[3" not in terminal.seen  # no colour
    terminal.send("\x1b[A\x1b[A\x1b[A\n")
    terminal.read("poem answers")
    terminal.read("› ")
    terminal.send("\x04")
    assert terminal.leave() == 0 and "Traceback" not in terminal.seen


def test_many_layers_fit_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, deciding: Path) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Screen()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    talk = Chat(recycler.load(deciding))
    talk.last = Answer("x", (Piece("x", (0.9, 0.1, 0.0, 0.0)),), {str(n): (0.9, 0.1, 0.0, 0.0) for n in range(80)})
    chat._Screen(talk.model.names).layers(talk)
    lines = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).splitlines()
    assert len(lines) == 4 and all(len(line) <= 40 for line in lines) and "▇▇▇▇▇▇▇▇" in lines[1]


@pytest.mark.parametrize("env, coloured", [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_no_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], coloured: bool) -> None:
    """And nothing that a terminal would obey, whatever a model says and an adapter is called."""

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    out, err = Screen(), Screen()
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "80", **env}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    screen = chat._Screen(["math", "law\x1b[2J"])
    pieces = (Piece(" a\x1b[2J", (1.0, 0.0)), Piece("[b]", (0.1, 0.9)), Piece("c", (0.1, 0.1)))
    for piece in pieces:
        screen.piece(piece)
    screen.finish(Answer("a[b]c", pieces, why={"task": "x\x07"}))
    shown = out.getvalue() + err.getvalue()
    assert ("\x1b[36m" in shown, "\x1b[33m" in shown) == (coloured, coloured) and "\x1b[2J" not in shown and "\x07" not in shown
    plain_text = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert plain_text.startswith("a[2J[b]c\n") and "math 40%, law[2J 33%, base 27%  because task x\\x07" in plain_text
