"""The trainer learns, resumes bit for bit, and refuses recipes and folders it cannot trust."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402

from localdepth.errors import StorageError, TrainError  # noqa: E402
from localdepth_train.checkpoint import Checkpoint  # noqa: E402
from localdepth_train.curriculum import StepsCurriculum  # noqa: E402
from localdepth_train.data import Encoder, draw_questions, micro_batches  # noqa: E402
from localdepth_train.evaluation import accuracy_at, judge_questions  # noqa: E402
from localdepth_train.objective import loss, right_rows  # noqa: E402
from localdepth_train.recipe import Recipe  # noqa: E402
from localdepth_train.reference import ReferenceModel  # noqa: E402
from localdepth_train.run_folder import RunFolder  # noqa: E402
from localdepth_train.tasks import Split, questions  # noqa: E402
from localdepth_train.tasks.off_topic import OFF_TOPIC  # noqa: E402
from localdepth_train.tasks.vocabulary import ANSWER, BOS, EOS, train_tokenizer  # noqa: E402
from localdepth_train.text.packing import IGNORED  # noqa: E402
from localdepth_train.trainer import Trainer, train  # noqa: E402
from tests.training import changed, records, tiny_recipe  # noqa: E402

THREAD_ROUNDING = 1e-6  # a gradient summed in the same order but computed beside another


@pytest.fixture(scope="module")
def tiny() -> Recipe:
    return tiny_recipe()


@pytest.fixture(scope="module")
def trained(tiny: Recipe) -> tuple[Trainer, list[float]]:
    """A trainer that has begun to answer one-step questions, and its losses."""
    trainer = Trainer(changed(tiny, steps=60, tasks=replace(tiny.phases[0].tasks, families=("turn",))))
    return trainer, [trainer.advance()["loss"] for _ in range(60)]


def test_loss_falls(trained: tuple[Trainer, list[float]]) -> None:
    _, losses = trained
    assert np.mean(losses[-5:]) < 0.4 * losses[0]


def test_a_stopped_run_ends_where_an_undisturbed_one_does(tiny: Recipe, tmp_path: Path) -> None:
    whole = train(tiny, tmp_path / "whole")
    stopped = train(tiny, tmp_path / "stopped", until=5)
    assert stopped.checkpoint is None
    resumed = train(tiny, tmp_path / "stopped")
    assert resumed == replace(whole, began=5, checkpoint=resumed.checkpoint)
    assert records(tmp_path / "whole") == records(tmp_path / "stopped")
    one = Checkpoint(tmp_path / "whole/checkpoint")
    other = Checkpoint(tmp_path / "stopped/checkpoint")
    assert all(np.array_equal(one.read(name), other.read(name)) for name in tiny.model.tensors())
    assert one.text("tokenizer.json") == other.text("tokenizer.json")


def test_a_killed_run_goes_on_from_its_last_saved_state(tiny: Recipe, tmp_path: Path) -> None:
    short = changed(tiny, steps=6)
    whole = train(short, tmp_path / "whole")
    train(short, tmp_path / "killed", until=4)
    saved = (tmp_path / "killed/state.pt").read_bytes()
    train(short, tmp_path / "killed", until=5)
    (tmp_path / "killed/state.pt").write_bytes(saved)  # as if killed after logging step 5, before saving it
    assert train(short, tmp_path / "killed").loss == whole.loss
    assert records(tmp_path / "whole") == records(tmp_path / "killed")


@pytest.mark.parametrize("bf16", [False, True])
def test_threads_change_the_time_not_the_result(tiny: Recipe, bf16: bool) -> None:
    alone, beside = (Trainer(replace(tiny, threads=threads, bf16=bf16)) for threads in (1, 2))
    for _ in range(3):
        assert alone.advance()["loss"] == pytest.approx(beside.advance()["loss"], rel=THREAD_ROUNDING)


def test_the_checkpoint_runs_and_carries_its_tokenizer(tiny: Recipe, tmp_path: Path) -> None:
    trainer = Trainer(tiny)
    trainer.advance()
    checkpoint = Checkpoint(trainer.export(tmp_path / "checkpoint"))
    assert checkpoint.config == tiny.model
    settings = json.loads(checkpoint.text("tokenizer_config.json") or "")
    model = ReferenceModel(checkpoint.config)
    model.load_state_dict({n: torch.from_numpy(checkpoint.read(n)) for n in checkpoint.config.tensors()})
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(model(ids, 2), trainer.model(ids, 2))
    assert (settings["bos_token"], settings["eos_token"]) == (BOS, EOS)
    assert settings["chat_template"].endswith(ANSWER)


def test_a_damaged_state_is_refused(tiny: Recipe, tmp_path: Path) -> None:
    train(tiny, tmp_path, until=1)
    whole = (tmp_path / "state.pt").read_bytes()
    middle = len(whole) // 2
    turned = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]  # one bit of a weight
    for damaged in (b"", whole[:middle], b"not a state", turned):
        (tmp_path / "state.pt").write_bytes(damaged)
        with pytest.raises(TrainError, match=r"cannot read .*state\.pt: \w[^;]+; give a new folder to start over$"):
            RunFolder(tmp_path).read_state()
    torch.save({"recipe": "0123", "step": 4}, tmp_path / "state.pt")  # of an older version
    with pytest.raises(TrainError, match="give a new folder"):
        RunFolder(tmp_path).read_state()


def test_nothing_is_promised_of_two_damaged_states(
    tiny: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("state.pt", "state.previous.pt"):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(TrainError, match=r"state\.pt: .*state\.previous\.pt: .* give a new folder"):
        train(tiny, tmp_path)
    assert not caplog.text


def test_a_batch_beyond_memory_is_refused_in_numbers(tiny: Recipe) -> None:
    with pytest.raises(TrainError, match=r"batch_size=1000000000000 in .* takes more than \d+ TB .* are free; give"):
        Trainer(replace(tiny, batch_size=10**12))


def test_a_folder_in_use_is_refused(tiny: Recipe, tmp_path: Path) -> None:
    with RunFolder(tmp_path), pytest.raises(TrainError, match="another run is going on"):
        train(tiny, tmp_path, until=1)
    assert train(tiny, tmp_path, until=1).steps == 1


def test_a_log_is_cut_after_a_step(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for rest, kept in (("", 2), ('{"step": 3}\n{"step"', 2), ('{"step": 2, "evaluation": {}}\n{"st', 3)):
        log.write_text('{"step": 1}\n{"step":   2}\n' + rest)
        before = log.read_bytes().splitlines(keepends=True)
        RunFolder(tmp_path).rewind_log(2)
        assert log.read_bytes() == b"".join(before[:kept])


def test_a_log_that_is_no_log_is_refused_and_kept(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\nshopping list\n')
    with pytest.raises(TrainError, match=r"line 2 is no record: .*; remove the line"):
        RunFolder(tmp_path).rewind_log(1)
    assert log.read_text().endswith("shopping list\n")
    log.unlink()
    log.mkdir()
    with pytest.raises(StorageError, match="cannot rewind"):
        RunFolder(tmp_path).rewind_log(1)


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make"):
        RunFolder(tmp_path / "file" / "run")


def test_a_loss_that_is_no_number_stops_the_run(tiny: Recipe) -> None:
    trainer = Trainer(tiny)
    with torch.no_grad():
        trainer.model.output_norm.weight.fill_(float("nan"))
    with pytest.raises(TrainError, match="learning rate"):
        trainer.advance()


def test_loss_is_the_mean_over_labelled_positions(tiny: Recipe) -> None:
    torch.manual_seed(0)
    model = ReferenceModel(tiny.model)
    ids = torch.randint(0, tiny.model.n_vocab, (2, 6))
    labels = torch.where(torch.rand(2, 6) < 0.5, torch.randint(0, tiny.model.n_vocab, (2, 6)), IGNORED)
    plain = functional.cross_entropy(model(ids, 3).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    assert loss(model, ids, labels, 1, 2).item() == pytest.approx(plain.item(), rel=1e-5)


def test_passes_without_gradient_give_none_to_the_core(tiny: Recipe) -> None:
    torch.manual_seed(0)
    model = ReferenceModel(tiny.model)
    ids = torch.randint(0, tiny.model.n_vocab, (2, 6))
    state = torch.randn(2, 6, tiny.model.n_embd, requires_grad=True)
    loss(model, ids, ids, 2, 1, state).backward()
    assert state.grad is None
    assert model.core[0].attn_q.weight.grad is not None
    assert model.prelude[0].attn_q.weight.grad is not None  # through the injected embeds


def test_right_rows_need_every_label_right() -> None:
    labels = torch.tensor([[IGNORED, 1, 2], [0, IGNORED, 2], [IGNORED, IGNORED, IGNORED]])
    logits = functional.one_hot(torch.tensor([1, 2, 0, 1]), 3).float()
    assert right_rows(logits, labels).tolist() == [True, False, True]


def test_evaluation_says_right_exactly_when_greedy_decoding_gives_the_answer(
    trained: tuple[Trainer, list[float]],
) -> None:
    trainer, _ = trained
    asked = questions("turn", 1, 30, 0, Split.HELD_OUT)
    judged = judge_questions(trainer.model, Encoder(trainer.tokenizer, dense=False), asked, [2]).accuracy
    right = [greedy(trainer, question.text) == question.answer for question in asked]
    assert judged == {("turn", 1, 2): sum(right) / len(right)}
    assert 0 < accuracy_at(judged, 2) < 1  # else this test shows nothing


def greedy(trainer: Trainer, text: str) -> str:
    ids = trainer.tokenizer.encode(f"{BOS}{text}{ANSWER}").ids
    end, start = trainer.tokenizer.token_to_id(EOS), len(ids)
    while len(ids) < start + 12:
        ids.append(int(trainer.model(torch.tensor([ids]), 2)[0, -1].argmax()))
        if ids[-1] == end:
            return str(trainer.tokenizer.decode(ids[start:-1]))
    return ""


def test_rows_label_the_answer_and_every_value(tiny: Recipe) -> None:
    tokenizer = train_tokenizer(tiny.model.n_vocab, 0)
    (question,) = questions("cup", 2, 1, 0, Split.TRAIN)
    (row,) = Encoder(tokenizer, dense=True).rows([question])
    (bare,) = Encoder(tokenizer, dense=False).rows([question])
    answer = tokenizer.encode(question.answer + EOS).ids
    values = [tokenizer.token_to_id("Ġ" + value) for _, value in question.labels]
    assert [label for label in row.labels if label != IGNORED] == values + answer
    assert [label for label in bare.labels if label != IGNORED] == answer
    assert row.ids == bare.ids == tokenizer.encode(f"{BOS}{question.text}{ANSWER}{question.answer}").ids


@pytest.mark.parametrize("processes", [1, 2])
def test_micro_batches_hold_every_question_once_and_long_ones_apart(tiny: Recipe, processes: int) -> None:
    curriculum = StepsCurriculum.begin(["cup", "hop"], 8, 8, 0.9, 0.5)
    tasks = replace(tiny.phases[0].tasks, off_topic_share=0.5, near_miss_share=0.2)
    drawn = draw_questions(curriculum, 104, tasks, random.Random(0))
    encoder = Encoder(train_tokenizer(tiny.model.n_vocab, 0), dense=True)
    batches = micro_batches(encoder, drawn, 4, processes)
    assert sorted(q.text for batch in batches for q in batch.questions) == sorted(q.text for q in drawn)
    assert len(batches) == 4
    assert all(len(batch.ids) % processes == 0 for batch in batches)
    costs = [batch.ids.numel() for batch in batches]
    assert costs == sorted(costs)
    shortest, *_, longest = sorted(batches, key=lambda batch: batch.ids.shape[1])
    assert longest.ids.shape[1] > 4 * shortest.ids.shape[1]
    assert {question.family for question in longest.questions} <= {OFF_TOPIC, "cup"}


def test_the_tokenizer_is_reproducible_and_accepts_any_text(tiny: Recipe) -> None:
    tokenizer = train_tokenizer(tiny.model.n_vocab, 0)
    assert tokenizer.to_str() == train_tokenizer(tiny.model.n_vocab, 0).to_str()
    for text in ("Grüße, 世界 🙂\n\ttab", "\x00\x7f", "1234567890"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("47 2026").ids) == 6


def test_a_vocabulary_too_small_for_the_values_is_refused() -> None:
    with pytest.raises(TrainError, match="raise n_vocab"):
        train_tokenizer(300, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_and_evaluates(tiny: Recipe, tmp_path: Path) -> None:
    report = train(replace(tiny, bf16=True), tmp_path)
    assert report.evaluation is not None
    assert set(report.evaluation.loss) == {1, 3}
