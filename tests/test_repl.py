"""``chat`` as scripts and people use it: entries, commands, Ctrl-C, a terminal."""

import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from localdepth.cli.commands import COMMANDS
from localdepth.cli.lines import open_history
from localdepth.cli.repl import run
from localdepth.cli.session import Session, Settings
from localdepth.conversation import Conversation
from localdepth.engine.toy import random_weights
from localdepth.errors import PromptError, StorageError
from localdepth.loading import inspect, load
from localdepth.model import Model
from localdepth.record import TokenizerRecord
from localdepth.sampling import Sampling
from tests import engines
from tests.conftest import TEMPLATE, tokenizer_json
from tests.published import EXPECTED

NO_END = Sampling(logit_bias={1: float("-inf")})
SECONDS = 30  # a busy machine may take a while


class Script:
    """Entries of a test; an exception stands for what ends or interrupts the typing."""

    def __init__(self, *entries: str | BaseException | type[BaseException]) -> None:
        self._entries = iter((*entries, EOFError))

    def next(self) -> str:
        entry = next(self._entries)
        if isinstance(entry, str):
            return entry
        raise entry


def open_model(file: Path | None) -> Model:
    return load(file, engine="toy", kv_type="f32")


class Talk:
    """A session with a small model; ``answers`` are what it showed."""

    def __init__(self, file: Path, *, is_live: bool = True, interrupt_after: int | None = None) -> None:
        self.answers: list[str] = []
        self._interrupt_after = interrupt_after
        settings = Settings(depth=2, sampling=NO_END, max_tokens=4, stop=(), state_seed=None)
        self.session = Session(open_model, file, Conversation(), settings, self._show, is_live=is_live)

    def __call__(self, *entries: str | BaseException | type[BaseException]) -> int:
        return run(self.session, Script(*entries))

    @property
    def said(self) -> list[tuple[str, int]]:
        return [(exchange.question, exchange.depth) for exchange in self.session.conversation.exchanges]

    def _show(self, pieces: Iterable[str]) -> None:
        shown = []
        for i, piece in enumerate(pieces):
            shown.append(piece)
            if i == self._interrupt_after:
                signal.raise_signal(signal.SIGINT)
        self.answers.append("".join(shown))


@pytest.fixture
def talk(model_file: Path) -> Iterator[Talk]:
    made = Talk(model_file)
    with made.session:
        yield made


def test_questions_are_answered_in_their_conversation(talk: Talk, model_file: Path) -> None:
    assert talk("the cat", "", "  ", " /the rat") == 0
    assert talk.said == [("the cat", 2), (" /the rat", 2)]
    with open_model(model_file) as model:
        assert talk.answers[0] == model.generate("the cat", depth=2, sampling=NO_END, max_tokens=4).text


def test_commands_change_the_next_question_and_the_last_one(talk: Talk) -> None:
    talk("/depth 3", "the cat", "/deeper", "/deeper", "/depth auto", "the rat", "/undo", "/retry")
    assert talk.said == [("the cat", 6)]
    talk("/new", "/system be brief", "the mat")
    assert talk.session.conversation.system == "be brief"
    assert talk.said == [("the mat", 6)]
    talk("/system -", "/new", "/quit", "never read")
    assert (talk.session.conversation.system, talk.said) == ("", [])


def test_a_retry_draws_other_tokens_and_the_next_question_the_first_ones(talk: Talk) -> None:
    talk.session.settings.sampling = replace(NO_END, temperature=2.0)
    talk("the cat", "/retry", "/retry", "/new", "the cat")
    assert len(set(talk.answers[:3])) == 3
    assert talk.answers[3] == talk.answers[0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("/depht 4", "did you mean /depth?"),
        ("/xyz", "/xyz is no command; /help lists them"),
        ("/", "/ is no command"),
        ("/depth 99", "1..64"),
        ("/depth fast", "quick"),
        ("/undo 3", "takes nothing"),
        ("/undo", "nothing has been asked"),
        ("/retry", "nothing has been asked"),
        ("/deeper", "nothing has been asked"),
        ("/save", "must end in .json or .md"),
        ("/save talk.txt", "must end in .json or .md"),
        ("/save /nowhere/at/all/talk.md", "cannot write"),
        ("/model /nowhere.gguf", "no such file"),
        ("abc " * 100, "n_ctx=64"),
    ],
)
def test_what_cannot_be_done_takes_one_line_and_the_session_goes_on(
    entry: str, message: str, talk: Talk, capfd: pytest.CaptureFixture[str]
) -> None:
    talk(entry, "the cat")
    lines = [line for line in capfd.readouterr().err.splitlines() if "Error" in line or "Overflow" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert len(talk.said) == 1


def test_a_script_ends_with_the_code_of_its_last_failure(model_file: Path) -> None:
    talk = Talk(model_file, is_live=False)
    with talk.session:
        assert talk("/depth 99", "the cat") == 2
        assert talk("the cat", PromptError("not UTF-8"), "the rat") == 2
        assert talk("/save /nowhere/talk.md") == 3
        assert len(talk.said) == 3
        with pytest.raises(KeyboardInterrupt):
            talk(KeyboardInterrupt)


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(model_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    talk = Talk(model_file, interrupt_after=2)
    before = signal.getsignal(signal.SIGINT)
    with talk.session:
        talk.session.settings.max_tokens = 30
        talk("the cat")
        [kept] = talk.session.conversation.exchanges
        assert (kept.answer, kept.finish_reason) == (talk.answers[0], "interrupted")
        assert "3 tokens" in capfd.readouterr().err
        talk("/retry")
        assert talk.session.conversation.exchanges == [kept]
        assert "as it was before" in capfd.readouterr().err
        talk("the rat")
        assert len(talk.said) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_between_answers_is_told_how_to_leave(talk: Talk, capfd: pytest.CaptureFixture[str]) -> None:
    assert talk(KeyboardInterrupt, "the cat") == 0
    assert "Ctrl-D or /quit leaves\ndepth 2" in capfd.readouterr().err


def test_what_the_model_no_longer_sees_is_said_once_each_time(talk: Talk, capfd: pytest.CaptureFixture[str]) -> None:
    talk(*(f"the rat {i}" for i in range(8)))
    told = re.findall(r"no longer sees questions 1 to (\d+)", capfd.readouterr().err)
    assert told
    assert told == sorted(set(told), key=int)
    assert len(talk.said) == 8


def test_another_model_goes_on_with_the_conversation(
    talk: Talk, model_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = replace(inspect(model_file), max_depth=8)
    record = TokenizerRecord(tokenizer_json(), bos=0, eos=(1,), add_bos=True)
    engines.write_model(tmp_path / "other file.gguf", config, random_weights(config, 5), tokenizer=record)
    engines.write_model(tmp_path / "mute.gguf", config, random_weights(config, 5))
    talk("/depth 9", "the cat", f"/model {tmp_path / 'mute.gguf'}", "the rat")
    assert "no tokenizer" in capfd.readouterr().err
    talk(f"/model {tmp_path / 'other file.gguf'}", "the mat", "/model")
    said = capfd.readouterr().err
    for message in ("no chat template", "no depth 9; it is auto now", "other file.gguf, depth 1 to 8"):
        assert message in said
    assert [depth for _, depth in talk.said] == [9, 9, 6]


def test_saving_writes_whole_files_and_never_over_one(talk: Talk, tmp_path: Path) -> None:
    save = f"/save {tmp_path}/talk.json"
    talk("the cat", save, f"/save {tmp_path}/talk.md", "the rat", save)
    saved = Conversation.from_json((tmp_path / "talk.json").read_text())
    assert [exchange.question for exchange in saved.exchanges] == ["the cat"]
    assert (tmp_path / "talk.md").read_text().startswith("> the cat\n")
    talk(f"/save! {tmp_path}/talk.json")
    assert len(json.loads((tmp_path / "talk.json").read_text())["exchanges"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["talk.json", "talk.md"]


def test_every_command_is_in_the_help(talk: Talk, capfd: pytest.CaptureFixture[str]) -> None:
    talk("/help")
    shown = capfd.readouterr().err
    assert all(name in shown for name in COMMANDS)


def test_history_is_private_and_lost_rather_than_fatal(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history"
    history = open_history(path)
    history.store_string("the cat")
    assert path.stat().st_mode & 0o077 == 0
    assert list(open_history(path).load_history_strings()) == ["the cat"]
    with pytest.raises(StorageError, match="not kept"):
        open_history(path / "below")
    path.unlink()
    path.mkdir()
    history.store_string("the rat")


def chat(*arguments: object, stdin: bytes, **env: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, "-m", "localdepth", "chat", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env={**os.environ, **env},
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_pipe_is_answered_line_by_line_without_codes(model_file: Path, tmp_path: Path) -> None:
    script = "the cät\nthe rat \\\nand the oats\n/deeper\n/save " + str(tmp_path / "t.json") + "\n"
    done = chat("-m", model_file, "--depth", 2, "--max-tokens", 3, stdin=script.encode(), FORCE_COLOR="")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    saved = Conversation.from_json((tmp_path / "t.json").read_text())
    assert [exchange.question for exchange in saved.exchanges] == ["the cät", "the rat \nand the oats"]
    with load(model_file) as model:
        assert done.stdout.startswith(model.generate("the cät", depth=2, max_tokens=3).text + "\n")
    again = chat("-m", model_file, "--from", tmp_path / "t.json", stdin=b"/undo")
    assert "taken back: the rat and the oats" in again.stderr


def test_bytes_that_are_no_text_cost_one_line(model_file: Path) -> None:
    done = chat("-m", model_file, "--max-tokens", 2, stdin=b"caf\xe9\nthe cat")
    assert done.returncode == 2
    assert "not UTF-8 at byte 3" in done.stderr
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--depth", "99"), "1..64"),
        (("--from", "/nowhere.json"), "cannot read"),
        (("--temperature", "-1"), "temperature=-1"),
        (("-m", "/nowhere.gguf"), "no such file"),
    ],
)
def test_a_session_that_cannot_begin_exits_with_two(arguments: Sequence[str], message: str) -> None:
    done = chat(*arguments, stdin=b"")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers end only where they are cut."""
    config = replace(EXPECTED["huginn"], n_vocab=300, n_ctx=4096)
    record = TokenizerRecord(tokenizer_json(), bos=0, eos=(), add_bos=True, chat_template=TEMPLATE)
    return engines.write_model(
        tmp_path_factory.mktemp("endless") / "m.gguf", config, random_weights(config, 0), tokenizer=record
    )


class Terminal:
    """The command in a pseudo-terminal."""

    def __init__(self, *arguments: object, width: int = 60, **env: str) -> None:
        import fcntl
        import pty
        import termios

        self._read, self._seen = b"", 0
        pid, self._end = pty.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execve(
                sys.executable,
                [sys.executable, "-m", "localdepth", "chat", *map(str, arguments)],
                {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **env},
            )
        self._pid = pid
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def until(self, text: str) -> None:
        """Read on until a text has come after the one before."""
        self._read_until(lambda: self._text.find(text, self._seen) >= 0)
        assert text in self._text[self._seen :], self._text
        self._seen = self._text.index(text, self._seen) + len(text)

    def skip(self, n_chars: int) -> None:
        """Read on until this much has come."""
        self._seen += n_chars
        self._read_until(lambda: len(self._text) >= self._seen)

    def wait(self) -> int:
        """The exit code."""
        self._read_until(lambda: False)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def _read_until(self, enough: Callable[[], bool]) -> None:
        began = time.monotonic()
        while not enough():
            assert time.monotonic() - began < SECONDS, self._text
            if select.select([self._end], [], [], 1)[0]:
                try:
                    self._read += os.read(self._end, 65536)
                except OSError:  # it has left
                    break

    @property
    def _text(self) -> str:
        """What it wrote, without codes."""
        return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", self._read.decode("utf-8", "replace"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("environment", [{}, {"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_a_person_asks_stops_goes_on_and_leaves(environment: dict[str, str], endless: Path, tmp_path: Path) -> None:
    terminal = Terminal(
        "-m", endless, "--depth", 2, "--max-tokens", 4000, width=40, XDG_STATE_HOME=str(tmp_path), **environment
    )
    terminal.until(">")
    terminal.type("the cat\\\r")
    terminal.type("sat\r")
    terminal.skip(200)  # the answer has begun
    terminal.type("\x03")
    terminal.until("stopped")
    terminal.until(">")
    terminal.type(f"/save {tmp_path}/t.json\r")
    terminal.until("saved to")
    terminal.until(">")
    terminal.type("\x03")
    terminal.until("Ctrl-D or /quit leaves")
    terminal.until(">")
    terminal.type("\x04")
    assert terminal.wait() == 0
    [kept] = Conversation.from_json((tmp_path / "t.json").read_text()).exchanges
    assert (kept.question, kept.finish_reason) == ("the cat\nsat", "interrupted")
    assert kept.answer
    assert "+the cat\n+sat" in (tmp_path / "localdepth" / "chat_history").read_text()
