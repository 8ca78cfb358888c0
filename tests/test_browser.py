"""The page in docs/browser, in Chromium without a network, gives the answers of the library."""

import json
import os
import shutil
import subprocess
from functools import partial
from typing import Any

import pytest

from localdepth.loading import EngineName, load, locate
from localdepth_train.tasks import evaluation
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "browser"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
REFUSED = "What is the capital of France?"


@pytest.fixture(scope="module")
def ask() -> Any:
    """Asks the page questions, each at a depth, with the default model."""
    browser, node = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("node")
    if browser is None or node is None:
        pytest.skip("no Chromium, or no node, on this machine")
    if not (PAGE / "node_modules").is_dir():
        pytest.skip(f"the page's libraries are not there; type npm ci in {PAGE}")
    return partial(run_page, node, browser)


def run_page(node: str, browser: str, questions: list[tuple[str, int]]) -> dict[str, Any]:
    done = subprocess.run(
        [node, PAGE / "check.mjs", locate(None, EngineName.ONNX)],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        env={**os.environ, "CHROMIUM": browser},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_its_answers_are_those_of_the_library_and_nothing_is_asked_of_the_network(ask: Any) -> None:
    questions = [(question.text, 16) for question in evaluation(3, 1, steps=(5,))] + [(REFUSED, 16)]
    sums = next(question.text for question in evaluation(3, 1, ["sum"], steps=(6,)))
    questions += [(sums, depth) for depth in (1, 4, 64)]
    shown = ask(questions)
    with load(engine="onnx") as model:
        assert shown["answers"] == [model.generate(text, depth=depth).text for text, depth in questions]
    assert (shown["complaints"], shown["foreign"]) == ([], [])


def test_a_question_longer_than_the_context_is_refused_in_words(ask: Any) -> None:
    assert ask([("Double it. " * 1000, 1)])["answers"] == ["more than the 1024 tokens this model reads"]
