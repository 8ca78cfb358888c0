"""The page in docs/browser, in Chromium without a network, gives the answers of the library."""

import hashlib
import json
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from localdepth.loading import EngineName, load, locate
from localdepth.onnx_folder.record import CHAT_TEMPLATE, CONFIG
from localdepth_train.tasks import evaluation
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "browser"
MODEL = locate(None, EngineName.ONNX)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
REFUSED = "What is the capital of France?"


@pytest.fixture(scope="module")
def ask() -> Any:
    """Asks the page questions, each at a depth, with the model in a folder."""
    browser, node = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("node")
    if browser is None or node is None:
        pytest.skip("no Chromium, or no node, on this machine")
    if not (PAGE / "node_modules").is_dir():
        pytest.skip(f"the page's libraries are not there; type npm ci in {PAGE}")
    return partial(run_page, node, browser)


def run_page(node: str, browser: str, questions: list[tuple[str, int]], folder: Path = MODEL) -> dict[str, Any]:
    done = subprocess.run(
        [node, PAGE / "check.mjs", folder],
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


def test_the_chat_template_is_the_one_of_the_folder_and_opens_an_answer(ask: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (folder / "tokenizer_config.json").write_text("{}")
    opening = "{% if add_generation_prompt %}<answer>{% endif %}"
    template = "{{ bos_token }}{{ messages[-1]['content'] | trim }}" + opening
    (folder / CHAT_TEMPLATE).write_text(template)
    record = json.loads((folder / CONFIG).read_text())
    record["checksums"][CHAT_TEMPLATE] = hashlib.sha256(template.encode()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(record))
    shown = ask([(REFUSED, 16)], folder)
    with load(folder) as model:
        assert shown["answers"] == [model.generate(REFUSED, depth=16).text]
