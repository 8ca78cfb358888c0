"""Threads and processes at once get the tokens that one alone gets, and none of them can stop or crash another."""

import faulthandler
import gc
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import pytest

from localdepth.errors import ContextOverflow, DepthError, LocalDepthError, PromptError
from localdepth.loading import load
from localdepth.model import Model
from localdepth.sampling import GREEDY, Sampling
from tests.conftest import ROOT

N_THREADS = 8
PATIENCE_S = 60.0  # for all threads of a test; on two busy cores they take some seconds


@dataclass(frozen=True)
class Job:
    """One request and how it is asked."""

    prompt: str
    depth: int | str
    sampling: Sampling = GREEDY
    state_seed: int | None = None

    def tokens(self, model: Model) -> list[int]:
        answer = model.generate(
            self.prompt, depth=self.depth, sampling=self.sampling, state_seed=self.state_seed, max_tokens=6
        )
        return [token.id for token in answer.tokens]


DRAWN = Sampling(temperature=1.0, top_p=0.95, seed=5)
JOBS = [
    Job("the cat sat", 1),
    Job("the cat sat", 5),  # the same deeper, and in another thread shallower
    Job("the cat sat", 5, DRAWN),
    Job("the cat sat", 3, Sampling(temperature=0.7, top_k=9, seed=6)),
    Job("on the mat the rat ate all the oats that the cat had left", "auto"),
    Job("on the mat", "quick", DRAWN, state_seed=9),
    Job("a rat", 12, state_seed=9),
    Job("oats", 2, Sampling(temperature=2.0, min_p=0.01, seed=7)),
]


@pytest.fixture(scope="module")
def alone(model_file: Path) -> list[list[int]]:
    """What each job gives on a model that has never been asked anything else."""
    answers = []
    for job in JOBS:
        with load(model_file) as model:
            answers.append(job.tokens(model))
    return answers


def together(*acts: Callable[[], object]) -> None:
    """Run all at once; raise what any raises, and show where they hang if they do not end."""
    failed: list[BaseException] = []
    start = threading.Barrier(len(acts))

    def run(act: Callable[[], object]) -> None:
        start.wait()
        try:
            act()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(act,), daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        faulthandler.dump_traceback(sys.__stderr__)
        pytest.fail("the threads do not end")
    if failed:
        raise failed[0]


def ask_all(model: Model, alone: Sequence[list[int]], first: int) -> None:
    """Every job, each thread beginning with another."""
    for i in islice(cycle(range(len(JOBS))), first, first + len(JOBS)):
        assert JOBS[i].tokens(model) == alone[i], JOBS[i]


def test_threads_that_share_a_model_get_the_tokens_of_one(model_file: Path, alone: list[list[int]]) -> None:
    with load(model_file) as model:
        together(*(partial(ask_all, model, alone, i) for i in range(N_THREADS)))


def test_threads_with_a_model_each_get_the_tokens_of_one(model_file: Path, alone: list[list[int]]) -> None:
    def ask(first: int) -> None:
        with load(model_file) as model:
            ask_all(model, alone, first)

    together(*(partial(ask, i) for i in range(N_THREADS)))


CROWD = """
import json, sys, threading
from localdepth.loading import load
from tests.test_concurrency import JOBS, N_THREADS
answers = [None] * N_THREADS
with load(sys.argv[1]) as model:
    def ask(i):
        answers[i] = [job.tokens(model) for job in JOBS]
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(N_THREADS)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
print(json.dumps(answers))
"""


def test_two_processes_of_eight_threads_get_the_tokens_of_one(model_file: Path, alone: list[list[int]]) -> None:
    command = [sys.executable, "-X", "faulthandler", "-c", CROWD, str(model_file)]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        said, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0
        assert json.loads(said) == [alone] * N_THREADS


def test_streams_advanced_in_turn_do_not_mix(model_file: Path, alone: list[list[int]]) -> None:
    with load(model_file) as model:
        streams = {
            i: model.stream(job.prompt, depth=job.depth, sampling=job.sampling, state_seed=job.state_seed, max_tokens=6)
            for i, job in enumerate(JOBS)
        }
        got: dict[int, list[int]] = {i: [] for i in streams}
        while streams:
            for i in list(streams):
                token = next(streams[i], None)
                if token is None:
                    del streams[i]
                else:
                    got[i].append(token.id)
        assert list(got.values()) == alone


def test_streams_closed_and_dropped_anywhere_leave_the_others_alone(model_file: Path, alone: list[list[int]]) -> None:
    def break_off(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(6):
            stream = model.stream("the rat ate", depth=rng.randint(1, 9), max_tokens=20)
            for _ in range(rng.randint(0, 3)):
                next(stream)
            if rng.random() < 0.5:
                closer = threading.Thread(target=stream.close)
                closer.start()
                for _ in stream:  # ends early, by the closer
                    pass
                closer.join()
            else:
                held = [stream]
                held.append(held)  # only the collector finds it
                del stream, held
                if rng.random() < 0.5:
                    gc.collect()

    with load(model_file) as model:
        acts = [partial(ask_all, model, alone, i) for i in range(4)]
        together(*acts, *(partial(break_off, seed) for seed in range(4)))
        ask_all(model, alone, 0)


def test_streams_may_be_collected_in_the_middle_of_another_models_work(model_file: Path) -> None:
    def work(model: Model, other: Model) -> None:
        for i in range(40):
            dropped = [other.stream("the rat ate", depth=1 + i % 5)]
            next(dropped[0])
            dropped.append(dropped)  # only the collector finds it, whenever it runs
            del dropped
            model.generate("the cat sat", depth=1 + i % 7, max_tokens=3)

    before = gc.get_threshold()
    gc.set_threshold(20)
    try:
        with load(model_file) as a, load(model_file) as b:
            together(*[partial(work, a, b)] * 4, *[partial(work, b, a)] * 4)
    finally:
        gc.set_threshold(*before)


def test_refused_requests_leave_the_others_alone(model_file: Path, alone: list[list[int]]) -> None:
    def ask_too_much() -> None:
        for _ in range(10):
            with pytest.raises(DepthError):
                model.generate("the cat", depth=10_000)
            with pytest.raises(ContextOverflow):
                model.generate("the cat " * 500, depth=1)
            with pytest.raises(PromptError):
                model.logits([1 << 20], depth=1)
            with pytest.raises(ZeroDivisionError):
                model.stream("the cat", depth=2, max_tokens=3).collect(on_token=lambda token: 1 / 0)

    with load(model_file) as model:
        acts = [partial(ask_all, model, alone, i) for i in range(4)]
        together(*acts, *[ask_too_much] * 4)


def test_measurements_and_answers_at_once(model_file: Path, alone: list[list[int]]) -> None:
    with load(model_file) as model:
        logits, embedding = model.logits([5, 6, 7], depth=4), model.embed("the cat")

        def measure() -> None:
            for _ in range(10):
                assert (model.logits([5, 6, 7], depth=4) == logits).all()
                assert (model.embed("the cat") == embedding).all()

        together(*(partial(ask_all, model, alone, i) for i in range(4)), *[measure] * 4)


CLOSING = """
import faulthandler, random, sys, threading, time
from localdepth.errors import EngineError
from localdepth.loading import load
faulthandler.dump_traceback_later(60, exit=True)
for turn in range(12):
    model = load(sys.argv[1])
    def ask():
        try:
            while True:
                for token in model.stream("the cat sat", depth=random.randint(1, 20), max_tokens=30): pass
        except EngineError as error:
            assert "closed" in str(error), error
            return
        raise AssertionError("a closed model answers")
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads: thread.start()
    time.sleep(0.02 * random.random())
    model.close()
    for thread in threads: thread.join()
print("done")
"""


def test_a_model_closed_under_its_users_ends_their_requests(model_file: Path) -> None:
    command = [sys.executable, "-X", "faulthandler", "-c", CLOSING, str(model_file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_errors_are_ours_whoever_meets_them(model_file: Path) -> None:
    model = load(model_file)
    stream = model.stream("the cat", depth=3)
    next(stream)
    model.close()
    with pytest.raises(LocalDepthError, match="closed"):
        next(stream)
    stream.close()
