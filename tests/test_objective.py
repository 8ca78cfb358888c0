"""The objective: depth per sequence, recomputed passes, agreement between depths, a teacher, documents apart."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from localdepth.engine.toy import random_weights  # noqa: E402
from localdepth_train.checkpoint import Checkpoint, save  # noqa: E402
from localdepth_train.data import MicroBatch  # noqa: E402
from localdepth_train.depth_sampler import Passes  # noqa: E402
from localdepth_train.objective import attends, decode, divergence, run_passes  # noqa: E402
from localdepth_train.recipe import ObjectiveRecipe  # noqa: E402
from localdepth_train.reference import ReferenceModel  # noqa: E402
from localdepth_train.reference_engine import load_reference  # noqa: E402
from localdepth_train.terms import Job, Objective  # noqa: E402
from localdepth_train.text.packing import IGNORED  # noqa: E402
from tests.published import EXPECTED  # noqa: E402

CONFIG = replace(EXPECTED["retrofit_llama"], n_vocab=64)
ROUNDING = 2e-5  # rows computed together or alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoint"), CONFIG, random_weights(CONFIG, seed=4))


@pytest.fixture
def model(folder: Path) -> ReferenceModel:
    return load_reference(Checkpoint(folder))


def tokens(n: int = 3) -> Tensor:
    return torch.randint(0, 64, (n, 7), generator=torch.Generator().manual_seed(0))


def gradients(model: ReferenceModel, ids: Tensor, passes: Sequence[Passes], **options: object) -> dict[str, Tensor]:
    """Of the summed cross entropy of predicting each token itself."""
    _, s = run_passes(model, ids, passes, **options)  # type: ignore[arg-type]
    loss = functional.cross_entropy(decode(model, s, ids), ids.flatten(), reduction="sum")
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=2, max_size=3))
def test_sequences_of_a_batch_run_as_they_would_alone(drawn: list[tuple[int, int]]) -> None:
    model = ReferenceModel(CONFIG)
    weights = random_weights(CONFIG, seed=4)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    passes, ids = [Passes(n, k) for n, k in drawn], tokens(len(drawn))
    together = gradients(model, ids, passes)
    alone = [gradients(model, ids[i : i + 1], passes[i : i + 1]) for i in range(len(drawn))]
    for name, gradient in together.items():
        expected = sum(one[name] for one in alone)
        assert torch.allclose(gradient, expected, rtol=1e-3, atol=ROUNDING * float(expected.abs().max())), name


def test_passes_of_other_processes_change_nothing(model: ReferenceModel) -> None:
    passes = [Passes(1, 2)] * 3
    elsewhere = [Passes(0, 2), Passes(3, 2)]
    alone, waiting = (gradients(model, tokens(), passes, others=others) for others in ((), elsewhere))
    for name, gradient in alone.items():
        assert torch.allclose(gradient, waiting[name], rtol=1e-4, atol=1e-6), name


def test_recomputed_passes_give_the_same_gradients(model: ReferenceModel) -> None:
    kept, again = (gradients(model, tokens(), [Passes(1, 3)] * 3, recompute=recompute) for recompute in (False, True))
    assert all(torch.equal(gradient, again[name]) for name, gradient in kept.items())


def test_the_half_way_state_lies_between(model: ReferenceModel) -> None:
    half, _ = run_passes(model, tokens(), [Passes(1, 4)] * 3)
    _, there = run_passes(model, tokens(), [Passes(1, 2)] * 3)
    assert torch.equal(half, there)


def test_divergence_is_that_of_the_distributions() -> None:
    a, b = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    p, q = (x.div(2.0).softmax(-1) for x in (b, a))
    assert divergence(a, b, 2.0).item() == pytest.approx(4 * float((p * (p / q).log()).sum()), rel=1e-4)
    assert divergence(a, a).item() == pytest.approx(0, abs=1e-6)


def test_documents_of_a_row_do_not_see_each_other(model: ReferenceModel) -> None:
    ids = tokens(1)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    first = decode(model, run_passes(model, ids[:, :3], [Passes(0, 2)])[1], ids[:, :3])
    apart = isolated(model, ids, documents)
    assert torch.allclose(apart[:3], first, atol=1e-5)
    other = ids.clone()
    other[0, :3] = 63 - other[0, :3]
    assert torch.equal(apart[3:], isolated(model, other, documents)[3:])


def isolated(model: ReferenceModel, ids: Tensor, documents: Tensor) -> Tensor:
    """Logits [T,V] of one packed row."""
    attend = attends(documents)
    return decode(model, run_passes(model, ids, [Passes(0, 2)], attend=attend)[1], ids, attend)


def job(ids: Tensor, *passes: Passes) -> Job:
    labels = torch.where(torch.arange(ids.shape[1]) % 2 == 0, ids, IGNORED)
    return Job(MicroBatch(ids, labels), list(passes), [], None, int((labels != IGNORED).sum()))


def value(model: ReferenceModel, recipe: ObjectiveRecipe, *passes: Passes) -> float:
    objective = Objective(model, recompute=False)
    objective.pursue(recipe)
    loss, _ = objective(job(tokens(), *passes))
    return float(loss.detach())


def test_a_teacher_that_agrees_adds_nothing(model: ReferenceModel, folder: Path) -> None:
    depth = Passes(model.config.default_depth - 1, 1)
    plain = value(model, ObjectiveRecipe(), *[depth] * 3)
    taught = ObjectiveRecipe(teacher=str(folder), distillation=1.0)
    assert value(model, taught, *[depth] * 3) == pytest.approx(plain, rel=1e-5)
    assert value(model, taught, *[Passes(0, 1)] * 3) > value(model, ObjectiveRecipe(), *[Passes(0, 1)] * 3) + 1e-4


def test_consistency_counts_where_depths_differ(model: ReferenceModel) -> None:
    agree = ObjectiveRecipe(consistency=1.0)
    one, many = [Passes(2, 1)] * 3, [Passes(0, 4)] * 3
    assert value(model, agree, *one) == pytest.approx(value(model, ObjectiveRecipe(), *one), rel=1e-6)
    assert value(model, agree, *many) > value(model, ObjectiveRecipe(), *many) + 1e-4
