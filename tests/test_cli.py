"""Every command as a user runs it: a process, its output, its exit code."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from localdepth.engine.toy import random_weights
from localdepth.gguf import read
from localdepth.loading import load
from localdepth.record import TokenizerRecord
from localdepth.sampling import Sampling
from localdepth_train.tasks.families import FAMILIES
from tests import engines
from tests.conftest import ROOT, tokenizer_json
from tests.published import EXPECTED, make_checkpoint


def localdepth(*arguments: object, stdin: bytes | None = None, env: dict[str, str] | None = None) -> Any:
    """Run the command; its result with text output."""
    done = subprocess.run(
        [sys.executable, "-m", "localdepth", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env={**os.environ, "COLUMNS": "100", **(env or {})},
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
    )


def one_line(done: Any) -> dict[str, Any]:
    """The object of ``--json``: standard output is exactly one line."""
    assert done.stdout.endswith("\n")
    assert done.stdout.count("\n") == 1
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def test_ask_equals_the_library(model_file: Path) -> None:
    done = localdepth("ask", "the cat", "--model", model_file, "--depth", 4, "--max-tokens", 9, "--json")
    with load(model_file) as model:
        answer = model.generate("the cat", depth=4, max_tokens=9)
    record = one_line(done)
    assert done.returncode == 0
    assert record["text"] == answer.text
    assert (record["depth"], record["mean_depth"], record["chosen_by"]) == (4, 4.0, "request")
    assert record["finish_reason"] == "length"
    assert record["stats"]["n_generated"] == 9
    assert set(record) == {"text", "depth", "mean_depth", "chosen_by", "reason", "finish_reason", "stats"}


def test_ask_puts_the_answer_on_standard_output_and_the_rest_on_standard_error(model_file: Path) -> None:
    done = localdepth("ask", "the cat", "--model", model_file, "--depth", "quick", "--max-tokens", 9)
    with load(model_file) as model:
        assert done.stdout == model.generate("the cat", depth="quick", max_tokens=9).text + "\n"
    assert "depth 1, chosen by request: 'quick' means depth 1 in this model" in done.stderr


def test_ask_reads_standard_input(model_file: Path) -> None:
    piped = localdepth("ask", "-", "-m", model_file, "--max-tokens", 5, "--json", stdin="the rät".encode())
    given = localdepth("ask", "the rät", "-m", model_file, "--max-tokens", 5, "--json")
    assert one_line(piped)["text"] == one_line(given)["text"]


def test_ask_shows_logprobs_when_asked(model_file: Path) -> None:
    shared = ("ask", "the cat", "-m", model_file, "--depth", 2, "--max-tokens", 4, "--kv-type", "f32")
    record = one_line(localdepth(*shared, "--logprobs", 2, "--json"))
    with load(model_file, kv_type="f32") as model:
        answer = model.generate("the cat", depth=2, max_tokens=4, top_logprobs=2)
        for shown, token in zip(record["tokens"], answer.tokens, strict=True):
            assert (shown["id"], shown["depth"]) == (token.id, 2)
            assert shown["text"] == model.token_text(token.id)
            assert shown["logprob"] == pytest.approx(token.logprob)
            assert [other["id"] for other in shown["top"]] == [i for i, _ in token.top]
    assert [token["top"] for token in one_line(localdepth(*shared, "--logprobs", 0, "--json"))["tokens"]] == [[]] * 4
    table = localdepth(*shared, "--logprobs", 2).stdout.removeprefix(answer.text + "\n").splitlines()
    assert table[0].split() == ["token", "logprob", "alternatives"]
    assert len(table) == 5


def test_ask_takes_every_request_setting(model_file: Path) -> None:
    words = "--temperature 1.5 --top-k 9 --top-p 0.9 --min-p 0.01 --repeat-penalty 1.3 --seed 4 --state-seed 5"
    settings = (*words.split(), "--system", "be brief", "--depth", "2", "--max-tokens", "8", "--json")
    record = one_line(localdepth("ask", "the cat", "-m", model_file, *settings))
    sampling = Sampling(temperature=1.5, top_k=9, top_p=0.9, min_p=0.01, repeat_penalty=1.3, seed=4)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat"}]
    with load(model_file) as model:
        expected = model.generate(messages, depth=2, max_tokens=8, sampling=sampling, state_seed=5)
    assert record["text"] == expected.text


def test_ask_takes_every_engine_setting(model_file: Path) -> None:
    shared = ("ask", "the cat", "-m", model_file, "--depth", 5, "--max-tokens", 6, "--json")
    plain = one_line(localdepth(*shared, "--kv-type", "f32"))["text"]
    assert one_line(localdepth(*shared, "--engine", "toy", "--kv-type", "f32"))["text"] == plain
    assert one_line(localdepth(*shared, "--kv-type", "f32", "--threads", 2, "--n-ctx", 32))["text"] == plain
    assert localdepth(*shared, "--ring", 1, "--temperature", 1, "--seed", 3, "--stop", "e").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hi", "--depth", "0"), "1..64"),
        (("hi", "--depth", "-3"), "depth=-3"),
        (("hi", "--depth", "65"), 'pass depth=64 or "auto"'),
        (("hi", "--depth", "2.5"), "depth='2.5'"),
        (("hi", "--depth", "fast"), "quick, deep"),
        (("",), "empty"),
        (("the cat " * 100,), "n_ctx=64"),
        (("hi", "--engine", "cuda"), "auto, ggml, onnx, toy"),
        (("hi", "--max-tokens", "0"), "max_tokens=0"),
        (("hi", "--temperature", "-1"), "temperature=-1"),
        (("hi", "--top-p", "2"), "top_p=2"),
        (("hi", "--state-seed", "-1"), "state_seed=-1"),
        (("hi", "--logprobs", "-1"), "top_logprobs=-1"),
        (("hi", "--logprobs", "999"), "top_logprobs=999"),
        (("hi", "--n-ctx", "100"), "1..64"),
        ((b"\xff\xfe".decode("utf-8", "surrogateescape"),), "UTF-8|surrogate|Unicode"),
    ],
)
def test_bad_requests_exit_with_two_and_a_remedy(arguments: tuple[str, ...], message: str, model_file: Path) -> None:
    done = localdepth("ask", *arguments, "--model", model_file)
    assert done.returncode == 2, done.stderr
    assert any(part in done.stderr for part in message.split("|")), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_invalid_utf8_on_standard_input_is_refused(model_file: Path) -> None:
    done = localdepth("ask", "-", "--model", model_file, stdin=b"caf\xe9")
    assert done.returncode == 2
    assert "not UTF-8 at byte 3" in done.stderr


def test_errors_are_json_too(model_file: Path) -> None:
    done = localdepth("ask", "hi", "--model", model_file, "--depth", "99", "--json")
    assert done.returncode == 2
    assert one_line(done)["error"]["type"] == "DepthError"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_a_machine_error(model_file: Path) -> None:
    command = f"{sys.executable} -m localdepth ask 'the cat' --model {model_file} --max-tokens 4"
    for redirection in ("> /dev/full", ">&-"):
        done = subprocess.run(["bash", "-c", f"{command} {redirection}"], capture_output=True, text=True)
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr


def test_any_locale_prints_any_text(model_file: Path) -> None:
    for encoding in ("ascii", "cp1252"):
        done = localdepth("ask", "日本", "-m", model_file, "--json", env={"PYTHONIOENCODING": encoding})
        assert done.returncode == 0, done.stderr


def test_text_from_a_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    config = EXPECTED["huginn"]
    weights = random_weights(config, 0)
    engines.write_model(tmp_path / "m.gguf", config, weights, provenance={"source": "\x1b]0;owned\x07\x9b2J"})
    shown = localdepth("inspect", tmp_path / "m.gguf").stdout
    assert "\\x1b]0;owned" in shown
    assert not set(shown) & {"\x1b", "\x07", "\x9b"}


def test_usage_errors_exit_with_two() -> None:
    assert localdepth("ask").returncode == 2
    assert localdepth("nothing").returncode == 2
    assert localdepth("--version").stdout.startswith("localdepth ")
    for command in ("ask", "chat", "bench", "doctor", "inspect", "curve", "verify", "export", "train"):
        assert localdepth(command, "--help").returncode == 0


def test_files_that_cannot_be_used_exit_with_two(tmp_path: Path, model_file: Path) -> None:
    whole = model_file.read_bytes()
    broken = {
        "cut.gguf": whole[: len(whole) // 2],
        "header.gguf": whole[:100],
        "magic.gguf": b"PK\x03\x04" + whole[4:],
        "empty.gguf": b"",
        "counts.gguf": whole[:8] + b"\xff" * 16 + whole[24:],
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        done = localdepth("ask", "hi", "--model", tmp_path / name)
        assert done.returncode == 2, (name, done.stderr)
        assert "ModelFileError" in done.stderr
    assert localdepth("inspect", tmp_path / "cut.gguf").returncode == 2
    assert localdepth("curve", "--model", tmp_path / "cut.gguf").returncode == 2
    assert localdepth("inspect", tmp_path / "missing.gguf").returncode == 2
    assert localdepth("ask", "hi", "--model", tmp_path).returncode == 2


def test_an_interrupted_answer_exits_with_130(tmp_path: Path) -> None:
    config = replace(EXPECTED["huginn"], n_vocab=300, n_ctx=4096)
    endless = TokenizerRecord(tokenizer_json(), bos=0, eos=(), add_bos=True)  # no token ends an answer
    engines.write_model(tmp_path / "m.gguf", config, random_weights(config, 0), tokenizer=endless)
    arguments = ["ask", "the cat sat", "--model", str(tmp_path / "m.gguf"), "--max-tokens", "4000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "localdepth", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    assert process.stdout is not None
    process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in errors


@pytest.mark.parametrize("module", ["rich.console", "numpy", "localdepth.model", "localdepth.cli.chat"])
def test_ctrl_c_while_importing_is_quiet(module: str) -> None:
    program = (
        "import signal, sys\n"
        "class Impatient:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Impatient())\n"
        "from localdepth.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_question_imports_no_line_editor(model_file: Path) -> None:
    program = (
        "import sys; from localdepth.cli import main\n"
        "try: main()\n"
        "finally: print({'prompt_toolkit', 'rich.markdown', 'torch'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, "ask", "the", "-m", str(model_file), "--max-tokens", "1"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.endswith("set()\n")


def test_a_reader_that_leaves_is_no_error(model_file: Path) -> None:
    command = f"{sys.executable} -m localdepth ask 'the cat' --model {model_file} --max-tokens 40 | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0


def test_inspect_shows_config_and_provenance(model_file: Path) -> None:
    record = one_line(localdepth("inspect", model_file, "--json"))
    assert record["config"]["n_core"] == 2
    assert record["tokenizer"]
    assert record["bytes_by_quant"]["F32"] > 0
    assert "n_prelude" in localdepth("inspect", model_file).stdout


def test_export_verify_and_ask_a_published_checkpoint(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "retrofit_llama")
    file = tmp_path / "model.gguf"
    done = localdepth("export", "gguf", checkpoint, "-o", file, "--quant", "f32", "--json")
    assert one_line(done)["kind"] == "retrofit Llama"
    report = one_line(localdepth("verify", file, checkpoint, "--depths", "1,4", "--json"))
    assert report["passed"]
    assert max(report["max_abs"]) < 1e-4
    with read(file) as written:
        assert written.check is not None
        assert written.check.depths == (1, 4)
    other = make_checkpoint(tmp_path / "other", "retrofit_llama", seed=9)
    done = localdepth("verify", file, other, "--no-record")
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "export it again" in done.stdout


def test_exporting_what_is_no_checkpoint_exits_with_two(tmp_path: Path) -> None:
    done = localdepth("export", "gguf", tmp_path, "-o", tmp_path / "x.gguf")
    assert done.returncode == 2
    assert "config.json" in done.stderr
    make_checkpoint(tmp_path, "huginn")
    assert localdepth("export", "gguf", tmp_path, "-o", tmp_path / "x.gguf", "--quant", "Q3").returncode == 2
    assert localdepth("export", "gguf", tmp_path, "-o", tmp_path / "no" / "x.gguf").returncode == 3


def test_curve_measures_a_file_of_questions(model_file: Path, tmp_path: Path) -> None:
    with load(model_file) as model:
        reply = model.generate("the cat", depth=2, max_tokens=48).text
    lines = [{"question": "the cat", "answer": reply, "steps": 2}, {"question": "the rat", "answer": "no such"}]
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines))
    done = localdepth("curve", "--model", model_file, "--data", data, "--depths", "1,2", "--json")
    record = one_line(done)
    assert record["by_steps"]["2"]["2"] == 1.0
    assert record["accuracy"]["2"] == 0.5
    for content, message in ((b'{"question": 1}', "line 1"), (b"\xff", "UTF-8"), (b"", "no questions")):
        data.write_bytes(content)
        done = localdepth("curve", "--model", model_file, "--data", data)
        assert done.returncode == 2
        assert message in done.stderr
    assert localdepth("curve", "--model", model_file, "--data", tmp_path / "none.jsonl").returncode == 2


def test_curve_asks_fresh_questions_of_every_family() -> None:
    done = localdepth("curve", "--depths", "1,8", "--steps", "1,4", "--per-cell", "18", "--seed", 5, "--json")
    record = one_line(done)
    assert set(record["by_steps"]) == {"1", "4"}
    assert set(record["by_family"]) == set(FAMILIES)
    assert record["n"] == {"1": 18, "4": 18}
    assert record["by_steps"]["4"]["8"] > record["by_steps"]["4"]["1"]
    assert record["passes_to_90"]["4"] == 8
    assert "0.0 % occur in training" in done.stderr
    shown = localdepth("curve", "--depths", "1,8", "--steps", "1", "--per-cell", "9").stdout
    assert "90 % at" in shown
    refused = localdepth("curve", "--depths", "1,65")
    assert refused.returncode == 2
    assert "1..64" in refused.stderr


def test_train_runs_a_recipe_and_goes_on(tmp_path: Path) -> None:
    recipe = (ROOT / "export" / "localdepth_train" / "recipes" / "default.toml").read_text()
    small = re.sub(r"^steps = \d+", "steps = 2", recipe, flags=re.MULTILINE)
    small = re.sub(r"^(batch_size|micro_batches|threads) = \d+", r"\1 = 1", small, flags=re.MULTILINE)
    small = re.sub(r"^evaluate_questions = \d+", "evaluate_questions = 1", small, flags=re.MULTILINE)
    (tmp_path / "recipe.toml").write_text(small)
    done = localdepth("train", "run", tmp_path / "recipe.toml", "-o", tmp_path / "run", "--json")
    assert one_line(done)["steps"] == 2, done.stderr
    assert "step 1 of 2: loss" in done.stderr
    assert localdepth("train", "run", tmp_path / "recipe.toml", "-o", tmp_path / "run").returncode == 0
    (tmp_path / "recipe.toml").write_text("speed = 3\n" + small)
    assert localdepth("train", "run", tmp_path / "recipe.toml", "-o", tmp_path / "run").returncode == 2


def test_an_interrupted_training_run_is_saved_and_goes_on(tmp_path: Path) -> None:
    recipe = (ROOT / "export" / "localdepth_train" / "recipes" / "default.toml").read_text()
    small = re.sub(r"^(batch_size|micro_batches|threads) = \d+", r"\1 = 1", recipe, flags=re.MULTILINE)
    (tmp_path / "recipe.toml").write_text(small)
    command = [sys.executable, "-m", "localdepth", "train", "run", str(tmp_path / "recipe.toml"), "-o"]
    for seen in ("step 1 of", "step "):
        process = subprocess.Popen([*command, str(tmp_path / "run")], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith(seen)
        assert line.startswith("step 1 of") == (seen == "step 1 of")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert process.returncode == 130
        assert "the same command goes on from there" in errors


def test_doctor_answers_for_people_and_programs() -> None:
    done = localdepth("doctor", "--json")
    record = one_line(done)
    assert done.returncode == (0 if record["ready"] else 1)
    assert {"python", "ggml", "default model"} <= {finding["name"] for finding in record["findings"]}
    assert "ggml" in localdepth("doctor").stdout


def test_commands_fit_a_narrow_terminal(model_file: Path) -> None:
    narrow = {"COLUMNS": "40"}
    for arguments in (("inspect", model_file), ("doctor",), ("ask", "the", "-m", model_file, "--max-tokens", 2)):
        done = localdepth(*arguments, env=narrow)
        assert done.returncode in (0, 1)
        assert "Traceback" not in done.stderr


def test_writing_over_a_device_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", "huginn")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    done = localdepth("export", "gguf", checkpoint, "-o", pipe)
    assert done.returncode == 3
    assert "device" in done.stderr
    assert pipe.is_fifo()


def test_a_reader_that_leaves_early_is_no_error_for_tables_either(model_file: Path) -> None:
    command = f"{sys.executable} -m localdepth inspect {model_file} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_standard_input_is_refused(model_file: Path) -> None:
    command = f"{sys.executable} -m localdepth ask - --model {model_file} <&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_paths_no_system_takes_are_refused_with_the_object() -> None:
    for path in ("a" * 5000, ""):
        done = localdepth("ask", "hi", "--model", path, "--json")
        assert done.returncode == 2, done.stderr
        assert one_line(done)["error"]["type"] == "ModelFileError"


@pytest.mark.parametrize("words", [("ask", "--json"), ("ask", "hi", "--foo", "--json"), ("models", "rm", "--json")])
def test_usage_errors_are_one_line_of_json_too(words: tuple[str, ...]) -> None:
    done = localdepth(*words)
    assert done.returncode == 2
    assert one_line(done)["error"]["type"] == "UsageError"
    assert done.stderr


def test_the_default_model_has_a_name() -> None:
    assert localdepth("ask", "Turn left.", "--model", "default").returncode == 0
    shown = one_line(localdepth("models", "show", "default", "--json"))
    assert shown["name"] == "default"


def test_inspect_checks_the_weights_and_shows_the_memory(model_file: Path, tmp_path: Path) -> None:
    record = one_line(localdepth("inspect", str(model_file), "--check", "--json", "--ring", "2"))
    assert record["intact"] is True
    assert [plan["ring"] for plan in record["memory"]] == [2] * len(record["memory"])
    raw = bytearray(model_file.read_bytes())
    raw[-5] ^= 1
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(raw)
    done = localdepth("inspect", str(damaged), "--check", "--json")
    assert (done.returncode, one_line(done)["intact"]) == (1, False)
    assert "K/V" in localdepth("inspect", str(model_file)).stdout
