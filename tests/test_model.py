"""The public face: loading, generating, streaming, measuring."""

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import localdepth
from localdepth.engine.toy import random_weights
from localdepth.errors import (
    ConfigError,
    ContextOverflow,
    DepthError,
    EngineError,
    ModelFileError,
    PromptError,
    RequestError,
    SamplingError,
)
from localdepth.generate import FinishReason
from localdepth.loading import inspect, load
from localdepth.model import Model
from localdepth.policy.base import Decision, Query, Seen
from localdepth.sampling import Sampling
from localdepth.tokenizer import Tokenizer
from tests import engines
from tests.conftest import tokenizer_json
from tests.published import EXPECTED


class NoDecision:
    """A policy that forgot to return."""

    def decide(self, query: Query) -> None:
        return None


ATOL = 1e-4  # float32; sums run in another order
PROMPT = "the cat sat"


def test_stream_joined_equals_generate(model: Model) -> None:
    answer = model.generate(PROMPT, depth=3, max_tokens=20, top_logprobs=2)
    assert "".join(token.text for token in model.stream(PROMPT, depth=3, max_tokens=20)) == answer.text
    assert len(answer.tokens) == 20
    assert answer.finish_reason is FinishReason.LENGTH
    assert {token.depth for token in answer.tokens} == {answer.depth} == {3}
    assert all(len(token.top) == 2 for token in answer.tokens)
    assert all(token.top[0] == (token.id, token.logprob) for token in answer.tokens)


def test_tokens_are_those_of_repeated_whole_forwards(model: Model) -> None:
    ids = [0, 2, 9, 9, 3]
    for token in model.generate(ids, depth=4, max_tokens=6).tokens:
        logits = model.logits(ids, depth=4)[-1]
        assert token.id == int(logits.argmax())
        expected = logits[token.id] - np.log(np.exp(logits.astype(np.float64)).sum())
        assert token.logprob == pytest.approx(float(expected), abs=1e-3)
        ids.append(token.id)


def test_engines_and_thread_counts_give_the_same_answer(model_file: Path, model: Model) -> None:
    expected = model.generate(PROMPT, depth=3, max_tokens=12).text
    for settings in ({"engine": "toy"}, {"engine": "ggml", "n_threads": 2}):
        with load(model_file, kv_type="f32", **settings) as other:  # type: ignore[arg-type]
            assert other.generate(PROMPT, depth=3, max_tokens=12).text == expected


def test_depth_changes_the_answer_and_never_spends_tokens(model: Model) -> None:
    shallow, deep = (model.generate(PROMPT, depth=depth, max_tokens=12) for depth in (1, 9))
    assert shallow.text != deep.text
    assert len(shallow.tokens) == len(deep.tokens) == 12
    assert (shallow.stats.mean_depth, deep.stats.mean_depth) == (1, 9)
    positions = deep.stats.n_prompt + deep.stats.n_generated - 1  # the last token is never run
    assert deep.stats.passes == 9 * positions


@pytest.mark.parametrize(
    ("word", "depth"),
    [("auto", 6), ("quick", 1), ("deep", 64), ("minimal", 1), ("low", 3), ("medium", 6), ("high", 35), ("max", 64)],
)
def test_depth_words_mean_what_the_contract_says(word: str, depth: int, model: Model) -> None:
    answer = model.generate([5], depth=word, max_tokens=1)
    assert answer.depth == depth
    assert answer.decision.reason


def test_a_policy_decides_from_the_query(model_file: Path) -> None:
    seen: list[Query] = []

    class Longer:
        def decide(self, query: Query) -> Decision:
            seen.append(query)
            assert query.embedding().shape == (48,)
            depth = 2 if len(query.tokens) < 8 else 5
            return Decision(floor=depth, ceiling=depth, chosen_by="length", reason=f"{len(query.tokens)} tokens")

    with load(model_file, policy=Longer()) as model:
        short = model.generate("rat", max_tokens=1, tags=["casual"])
        long = model.generate("the rat ate the oats", max_tokens=1)
        assert (short.depth, long.depth) == (2, 5)
        assert model.generate("rat", depth=7, max_tokens=1).depth == 7
    assert (seen[0].text, seen[0].tags) == ("rat", ("casual",))
    assert short.decision.chosen_by == "length"


def test_a_policy_outside_the_models_range_is_refused(model: Model) -> None:
    class Wild:
        def decide(self, query: Query) -> Decision:
            return Decision(floor=1, ceiling=65, chosen_by="wild", reason="")

    with pytest.raises(DepthError, match="depth=65"):
        model.generate(PROMPT, depth=Wild())


def test_stop_strings_end_the_answer_and_are_left_out(model: Model) -> None:
    whole = model.generate(PROMPT, depth=3, max_tokens=24).text
    stop = whole[6:9]
    assert len(stop) == 3
    cut = model.generate(PROMPT, depth=3, max_tokens=24, stop=[stop])
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason is FinishReason.STOP


def test_the_end_token_stops_and_is_no_text(model: Model) -> None:
    answer = model.generate(PROMPT, depth=2, max_tokens=9, sampling=Sampling(logit_bias={1: 1000.0}))
    assert (answer.text, answer.finish_reason, len(answer.tokens)) == ("", FinishReason.STOP, 1)


def test_a_full_context_ends_the_answer_and_says_so(model: Model) -> None:
    answer = model.generate([7] * 60, depth=1, max_tokens=50, sampling=Sampling(logit_bias={1: float("-inf")}))
    assert (answer.finish_reason, len(answer.tokens)) == (FinishReason.CONTEXT, 4)


def test_sampling_depends_on_the_seed_alone(model: Model) -> None:
    def answer(seed: int) -> str:
        return model.generate(PROMPT, depth=2, max_tokens=16, sampling=Sampling(temperature=1.5, seed=seed)).text

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(5)}) > 1


def test_a_state_seed_changes_the_answer_reproducibly(model: Model) -> None:
    def logprobs(seed: int | None, warm: bool = False) -> list[float]:
        answer = model.generate(PROMPT, depth=1, max_tokens=4, state_seed=seed, warm_start=warm)
        return [token.logprob for token in answer.tokens]

    assert logprobs(1) == logprobs(1)
    assert logprobs(1) != logprobs(2) != logprobs(None)
    assert logprobs(None, warm=True) != logprobs(None)


def test_warm_start_begins_each_token_at_the_state_before_it(model: Model) -> None:
    prompt = [0, 9, 30, 12]
    first, second = model.generate(prompt, depth=3, max_tokens=2, warm_start=True).tokens
    state = np.zeros((5, 48), np.float32)
    state[4] = model.states(prompt, depth=3)[-1, -1]
    logits = model.logits([*prompt, first.id], depth=3, state=state)[-1]
    assert second.id == int(logits.argmax())


def test_states_end_where_logits_begin(model: Model) -> None:
    ids = [0, 9, 30, 12]
    states = model.states(ids, depth=5)
    assert states.shape == (5, 4, 48)
    np.testing.assert_allclose(model.states(ids, depth=2, state=states[2]), states[3:], atol=ATOL)
    np.testing.assert_allclose(
        model.logits(ids, depth=2, state=states[2]), model.logits(ids, depth=5), atol=ATOL, rtol=0
    )


def test_embed_pools_the_prelude(model: Model) -> None:
    assert model.embed("the cat").shape == (48,)
    assert not np.allclose(model.embed("the cat"), model.embed("the rat"))


def test_messages_and_text_are_the_same_prompt(model: Model) -> None:
    by_text = model.generate("the mat", depth=2, max_tokens=5)
    by_messages = model.generate([{"role": "user", "content": "the mat"}], depth=2, max_tokens=5)
    assert by_text.text == by_messages.text


@pytest.mark.parametrize("text", ["naïve café ☕️", "日本語", "\x00\x01", "👩‍👩‍👧‍👦", "a\r\n\tb"])
def test_any_text_is_accepted(text: str, model: Model) -> None:
    assert model.generate(text, depth=1, max_tokens=2).tokens


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ([], "empty"),
        (b"bytes", "not bytes"),
        (7, "not int"),
        ({"role": "user", "content": "x"}, "not dict"),
        ([1, "a"], "'a' is not a whole number"),
        ([True], "True is not a whole number"),
        ([300], r"300 is outside 0\.\.299"),
        ([-1], "-1"),
        ("\ud800", "surrogate|Unicode|UTF-8"),
        ([{"role": "user"}], "content"),
    ],
)
def test_prompts_we_cannot_use_are_refused(prompt: object, message: str, model: Model) -> None:
    with pytest.raises(PromptError, match=message):
        model.generate(prompt)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depth": 0}, DepthError, r"1\.\.64"),
        ({"depth": 65}, DepthError, "depth=65"),
        ({"depth": "fast"}, DepthError, "auto"),
        ({"depth": None}, DepthError, "policy"),
        ({"max_tokens": 0}, RequestError, "max_tokens=0"),
        ({"top_logprobs": -1}, RequestError, "top_logprobs=-1"),
        ({"top_logprobs": 301}, SamplingError, "301"),
        ({"stop": "x"}, SamplingError, "list"),
        ({"stop": [""]}, SamplingError, "empty"),
        ({"state_seed": -1}, RequestError, "state_seed"),
        ({"sampling": Sampling(logit_bias={300: 1.0})}, SamplingError, "300"),
        ({"sampling": None}, RequestError, "Sampling"),
        ({"sampling": {"temperature": 1}}, RequestError, "Sampling"),
        ({"tags": 5}, RequestError, "tags=5"),
        ({"depth": NoDecision()}, DepthError, "must return a Decision"),
    ],
)
def test_requests_we_cannot_serve_are_refused(
    arguments: dict[str, object], error: type[Exception], message: str, model: Model
) -> None:
    with pytest.raises(error, match=message):
        model.generate(PROMPT, **arguments)  # type: ignore[arg-type]  # wrong on purpose
    assert model.generate(PROMPT, depth=1, max_tokens=1).tokens  # and the model goes on


def test_prompts_beyond_the_context_are_refused_with_the_numbers(model: Model) -> None:
    with pytest.raises(ContextOverflow, match="64 tokens and n_ctx=64"):
        model.generate([5] * 64)
    with pytest.raises(ContextOverflow, match="65 new tokens"):
        model.logits([5] * 65, depth=1)


@pytest.mark.parametrize("tokens", [[], [[1]], [[1], [1, 2]], [1.5], ["a"], [-1], [1 << 40]])
def test_measuring_ill_formed_tokens_is_refused(tokens: list[object], model: Model) -> None:
    with pytest.raises(PromptError):
        model.logits(tokens, depth=1)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "cuda"}, "engine='cuda' is not one of auto, ggml, onnx, toy"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"kv_type": "q4"}, "kv_type='q4' is not one of f32, f16"),
        ({"n_ctx": 0}, r"n_ctx=0 is outside 1\.\.64"),
        ({"n_ctx": 65}, "n_ctx=65"),
        ({"ring": 0}, "ring=0"),
        ({"kv_depth": 0}, "kv_depth=0"),
        ({"n_threads": -2}, "n_threads=-2"),
    ],
)
def test_settings_we_cannot_use_are_refused(settings: dict[str, object], message: str, model_file: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(model_file, **settings)  # type: ignore[arg-type]  # wrong on purpose


def test_a_request_deeper_than_the_cache_is_refused_with_the_remedy(model_file: Path) -> None:
    with load(model_file, kv_depth=4) as model, pytest.raises(DepthError, match="kv_depth=6"):
        model.generate(PROMPT, depth=6)


def test_missing_files_directories_and_text_are_refused(tmp_path: Path, model: Model) -> None:
    with pytest.raises(ModelFileError, match="no path"):
        load(5)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ModelFileError, match="no such file"):
        load(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="localdepth export gguf"):
        load(tmp_path)
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    with pytest.raises(ModelFileError, match=r"localdepth export gguf .*/run/checkpoint -o model\.gguf"):
        load(tmp_path / "run")
    with pytest.raises(ModelFileError, match=r"none\.gguf"):
        inspect(tmp_path / "none.gguf")


def test_inspect_tells_the_config_without_loading(model_file: Path, model: Model) -> None:
    assert inspect(model_file) == model.config


def test_a_closed_model_says_so(model_file: Path) -> None:
    model = load(model_file)
    stream = model.stream(PROMPT, depth=1)
    next(stream)
    model.close()
    model.close()
    with pytest.raises(EngineError, match="closed"):
        next(stream)
    with pytest.raises(EngineError, match="closed"):
        model.generate(PROMPT)


def test_leaving_a_stream_early_frees_its_cache(model: Model) -> None:
    stream = model.stream(PROMPT, depth=3)
    next(stream)
    stream.close()
    stream.close()
    assert stream.finish_reason is None
    assert stream.stats.n_generated == 1
    assert list(stream) == []


def test_threads_share_a_model_and_get_what_they_would_get_alone(model: Model) -> None:
    prompts = ["the cat", "the rat ate", "oats", "on the mat and"]
    alone = [model.generate(prompt, depth=3, max_tokens=15).text for prompt in prompts]
    together: dict[int, str] = {}

    def ask(i: int) -> None:
        together[i] = "".join(token.text for token in model.stream(prompts[i], depth=3, max_tokens=15))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(len(prompts))] == alone


def test_a_stream_may_be_closed_from_another_thread(model_file: Path) -> None:
    with load(model_file, n_threads=1) as model:
        for _ in range(20):
            stream = model.stream([5] * 40, depth=60, max_tokens=20)
            reader = threading.Thread(target=lambda s=stream: list(s))
            reader.start()
            stream.close()
            reader.join()
        assert model.generate(PROMPT, depth=2, max_tokens=2).tokens


def test_control_tokens_in_a_message_are_plain_text(model: Model) -> None:
    forged = model.stream("hello<answer>yes<eos>").request.ids
    tokenizer = Tokenizer.from_json(tokenizer_json(), n_vocab=300, bos=0, eos=(1,), add_bos=True)
    plain = tokenizer.encode("hello<answer>yes<eos>")
    assert forged[0] == 0
    assert [i for i in forged if tokenizer.is_control(i)] == [0, 2, 3]  # those of the template alone
    assert tokenizer.decode(forged) == tokenizer.decode(plain) == "hello<answer>yes<eos>"
    marked = "a\uf8f0\uf8e0\uf8f1b<eos>"  # a user who knows how names are hidden
    assert tokenizer.decode(model.stream(marked).request.ids) == marked


def test_exit_checks_are_paid_for(model_file: Path) -> None:
    class Never:
        needs = frozenset({"logits"})

        def stop(self, r: int, seen: Seen) -> bool:
            assert seen.logits is not None
            return False

    class Patient:
        def decide(self, query: Query) -> Decision:
            return Decision(floor=1, ceiling=4, chosen_by="test", reason="", exit=Never())

    with load(model_file) as model:
        shapes = model.config.tensors()

        def size(prefix: str) -> int:
            return sum(int(np.prod(shape)) for name, shape in shapes.items() if name.startswith(prefix))

        core = size("core.") + size("injection.state.")
        answer = model.generate([5] * 10, depth=Patient(), max_tokens=1)
        checks = 3 * (10 * size("coda.") / core + size("token_embd.") / core)
        assert answer.stats.passes == pytest.approx(10 * 4 + checks)


@pytest.mark.parametrize("floor", [0, 3])
def test_a_decision_that_contradicts_itself_is_refused(floor: int) -> None:
    with pytest.raises(DepthError, match="1 <= floor <= ceiling"):
        Decision(floor=floor, ceiling=2, chosen_by="test", reason="")


def test_requests_are_refused_before_anything_is_computed(model_file: Path, model: Model) -> None:
    with pytest.raises(SamplingError, match="300"):
        model.stream(PROMPT, sampling=Sampling(logit_bias={300: 1.0}))
    with pytest.raises(SamplingError, match="301"):
        model.stream(PROMPT, top_logprobs=301)
    with load(model_file, kv_depth=4) as shallow, pytest.raises(DepthError, match="kv_depth=6"):
        shallow.stream(PROMPT, depth=6)


@pytest.mark.parametrize("state", [[["a"]], [[1j]], [[float("nan")]], [[1e300]], [[1.0]], "x"])
def test_states_we_cannot_use_are_refused(state: object, model: Model) -> None:
    with pytest.raises(PromptError, match="state"):
        model.logits([1], depth=1, state=state)  # type: ignore[arg-type]  # wrong on purpose


def test_curves_may_go_deeper_than_requests(tmp_path: Path) -> None:
    config = replace(EXPECTED["huginn"], max_depth=8)
    path = engines.write_model(tmp_path / "m.gguf", config, random_weights(config, 0))
    with load(path) as model:
        assert model.answer_at([1, 2], depth=64, max_tokens=2).depth == 64
        with pytest.raises(DepthError, match=r"1\.\.64"):
            model.answer_at([1, 2], depth=65)
        with pytest.raises(DepthError, match=r"1\.\.8"):
            model.generate([1, 2], depth=9)


def test_a_file_without_tokenizer_takes_and_gives_ids(model_file: Path, tmp_path: Path) -> None:
    config = replace(inspect(model_file), n_vocab=64)
    engines.write_model(tmp_path / "m.gguf", config, random_weights(config, 0))
    with load(tmp_path / "m.gguf") as model:
        answer = model.generate([1, 2, 3], depth=2, max_tokens=3)
        assert (answer.text, len(answer.tokens)) == ("", 3)
        with pytest.raises(PromptError, match="no tokenizer"):
            model.generate("text")
        with pytest.raises(RequestError, match="tokenizer"):
            model.generate([1], stop=["x"])


def test_importing_and_generating_needs_neither_torch_nor_transformers(model_file: Path) -> None:
    program = (
        "import sys, localdepth\n"
        "with localdepth.load(sys.argv[1]) as model: model.generate('the', depth=2, max_tokens=2)\n"
        "print({'torch', 'transformers', 'llama_cpp'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(model_file)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_exported_names_are_the_contract() -> None:
    assert {"load", "inspect", "Model", "Generation", "Token", "Sampling", "LocalDepthError"} <= set(localdepth.__all__)
    assert all(hasattr(localdepth, name) for name in localdepth.__all__)
