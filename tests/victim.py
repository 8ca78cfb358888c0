"""A process that does with files what a user does, so that a crash, a hang or a flood of memory is a test result.

``Victim`` starts this module as a program and hands it one file after the other: a model file, a tokenizer.json or a
chat template. The program lives on as long as nothing goes wrong, with little memory to waste, and answers each path
with one line of JSON.
"""

import json
import os
import queue
import resource
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from localdepth.chat import ChatTemplate
from localdepth.errors import LocalDepthError
from localdepth.gguf import read
from localdepth.loading import inspect, load
from localdepth.model import Model
from localdepth.record import summary
from localdepth.sampling import GREEDY, Sampling
from localdepth.tokenizer import Tokenizer

__all__ = ["Outcome", "Victim"]

_ROOM = 1 << 30  # bytes of address space beyond what the imports took; sound files take a tenth of it
_START_S = 60.0
_SLOW_DEPTH = 16  # a file may ask for more passes by default, which takes long and harms nobody
_TEXT = "How many apples does Tom have?\n" * 3
_DRAWN = Sampling(temperature=1.0, top_k=5, top_p=0.9, seed=1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a file.

    Attributes:
        end: ``used``, ``refused`` (by an error of ours), or bad: ``escaped`` (another exception), ``died``, ``hung``.
        said: the error, the traceback or the exit code.
    """

    end: str
    said: str = ""

    @property
    def harmless(self) -> bool:
        """Whether the file was used or refused, and that not because an allocation failed."""
        return self.end in ("used", "refused") and "not enough memory" not in self.said


class Victim:
    """Uses files in a process of its own, which is replaced when a file has killed it."""

    def __init__(self, seconds: float) -> None:
        """``seconds`` is what one file may take."""
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def use(self, path: Path) -> Outcome:
        """Use a file: ``.gguf``, ``.json`` for a tokenizer or ``.jinja`` for a chat template."""
        process = self._process or self._start()
        assert process.stdin is not None
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        try:
            line = self._lines.get(timeout=self._seconds)
        except queue.Empty:
            self._end()
            return Outcome("hung", f"for {self._seconds} s")
        if not line:
            code = process.wait()
            self._end()
            return Outcome("died", f"with exit code {code}")
        return Outcome(**json.loads(line))

    def _start(self) -> "subprocess.Popen[str]":
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where Rust prints its panics
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        self._lines = queue.Queue()
        threading.Thread(target=_pump, args=(process.stdout, self._lines.put), daemon=True).start()
        assert self._lines.get(timeout=_START_S) == "ready\n"
        return process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                stream.close()
            self._process = None


def _pump(stream: IO[str], put: Callable[[str], None]) -> None:
    try:
        for line in stream:
            put(line)
    except ValueError:  # closed
        return
    put("")


def _use_model(path: Path) -> None:
    inspect(path)
    with read(path) as file:
        json.dumps(summary(file))
        speaks = file.tokenizer is not None
    with load(path, engine="ggml", n_threads=1) as model:
        config = model.config
        ids = [0, config.n_vocab - 1, 0]
        results = [
            _try(lambda: model.generate(_TEXT, depth=1, max_tokens=3) if speaks else None),
            _try(lambda: _ask(model, ids, 1)),
            _try(lambda: _ask(model, ids, min(3, config.max_depth), _DRAWN)),
            _try(lambda: _ask(model, ids, "auto") if config.default_depth <= _SLOW_DEPTH else None),
            _try(lambda: model.logits(ids, depth=2)),
            _try(lambda: model.states(ids, depth=2)),
            _try(lambda: model.embed(_TEXT) if speaks else None),
        ]
    for error in filter(None, results):
        raise error


def _ask(model: Model, ids: list[int], depth: int | str, sampling: Sampling = GREEDY) -> None:
    model.generate(ids, depth=depth, sampling=sampling, max_tokens=3, state_seed=7, top_logprobs=2)


def _try(act: Callable[[], Any]) -> LocalDepthError | None:
    """A refused request leaves the model usable for the next."""
    try:
        act()
    except LocalDepthError as error:
        return error
    return None


def _use_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer.from_json(path.read_text("utf-8"), n_vocab=1 << 20, bos=None, eos=(), add_bos=False)
    for text in ("a" * 3000 + "!c", " " * 3000 + "!c", "\ufdfa\u0130\u00e9" * 300, _TEXT):
        ids = tokenizer.encode(text)
        tokenizer.decode(ids[:100])
    tokenizer.decode(range(min(len(tokenizer.control_names), 100)), skip_special=False)


def _use_template(path: Path) -> None:
    template = ChatTemplate(path.read_text("utf-8"), bos="<s>", eos="</s>")
    template.render([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a " * 50}])


_USES = {".gguf": _use_model, ".json": _use_tokenizer, ".jinja": _use_template}


def _outcome(path: Path) -> dict[str, str]:
    try:
        _USES[path.suffix](path)
    except LocalDepthError as error:
        return {"end": "refused", "said": f"{type(error).__name__}: {error}"}
    except BaseException:
        return {"end": "escaped", "said": traceback.format_exc()[-3000:]}
    return {"end": "used"}


def main() -> None:
    """Answer paths from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    with load(engine="ggml", n_threads=1) as model:  # what every file shares is imported and opened
        model.generate("hi", max_tokens=1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, used + _ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_outcome(Path(line.rstrip("\n")))), file=answers, flush=True)


if __name__ == "__main__":
    main()
