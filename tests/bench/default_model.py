"""What the default model answers right at each depth, and what it refuses.

    python -m tests.bench.default_model answers [--model FILE] [--each 300] [--depths 1,2,3,4,6,8,16]
    python -m tests.bench.default_model refusals [--model FILE] [--each 300] [--prompts FILE ...]

The first asks held-out questions of every family with one to eight steps. The second gives other people's prompts and
near misses, which should be refused, and questions, which should not. Prompt files are JSONL with ``prompt`` or
``turns`` in each line, or CSV with a column ``prompt``, plain or gzipped; longer ones than the context are cut.
Near misses are generated with compositions and names that training never showed; the sentences and words that spoil
them are those of training.
"""

import argparse
import csv
import gzip
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

from localdepth.loading import load
from localdepth.model import Model
from localdepth_apps.curve import measure
from localdepth_train.tasks import TRAINED_STEPS, Split, evaluation, is_right
from localdepth_train.tasks.families import FAMILIES
from localdepth_train.tasks.near_miss import KINDS
from localdepth_train.tasks.off_topic import REFUSAL

DEPTH = 16
SEED = 20270103
STEPS = range(1, TRAINED_STEPS + 1)
ROOM = 24  # tokens of the context that an answer may need


def prompts(path: Path) -> Iterator[str]:
    """The prompts of a file."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as lines:
        if ".csv" in path.suffixes:
            csv.field_size_limit(1 << 30)
            yield from (row["prompt"] for row in csv.DictReader(lines))
        else:
            yield from (record.get("prompt") or record["turns"][0] for record in map(json.loads, lines))


def cut(model: Model, text: str) -> str:
    """As much of ``text`` from its beginning as the context holds."""
    most = model.config.n_ctx - ROOM
    while (n_tokens := len(model.tokenize(text))) > most:
        text = text[: len(text) * most // n_tokens - 1]
    return text


def tell(model: Model, name: str, texts: Iterable[str]) -> None:
    """One row: how many there are, which share is refused, and the first that is not."""
    answers = [(text, model.generate(cut(model, text), depth=DEPTH).text) for text in texts if text.strip()]
    answered = [(text, answer) for text, answer in answers if answer != REFUSAL]
    example = " → ".join(answered[0])[-90:].replace("\n", " ").replace("|", "/") if answered else ""
    share = 100 * (1 - len(answered) / len(answers))
    print(row(name, len(answers), f"{share:.1f}", example), flush=True)


def answers(model: Model, each: int, depths: Sequence[int]) -> None:
    """Print right answers in percent: every cell, then means over families and over steps."""
    cells: dict[tuple[str, int, int], float] = {}
    print(
        "| family | depth | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |\n|---|---|" + "---|" * len(STEPS)
    )
    for family in FAMILIES:
        for steps in STEPS:
            asked = measure(model, evaluation(SEED, each, [family], [steps]), depths, is_right)
            cells |= {(family, steps, depth): 100 * cell.accuracy for depth, cell in asked.total.items()}
        for depth in depths:
            print(row(family, depth, *(f"{cells[family, steps, depth]:.1f}" for steps in STEPS)), flush=True)
    print("\n" + row("", *(f"depth {depth}" for depth in depths)))
    print("|---|" + "---|" * len(depths))
    groups: list[tuple[str, Sequence[str], Sequence[int]]] = [
        *((f"{steps} steps", list(FAMILIES), [steps]) for steps in STEPS),
        *((family, [family], STEPS) for family in FAMILIES),
        ("all", list(FAMILIES), STEPS),
    ]
    for name, families, lengths in groups:
        means = (fmean(cells[one, steps, depth] for one in families for steps in lengths) for depth in depths)
        print(row(name, *(f"{mean:.1f}" for mean in means)))


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def refusals(model: Model, each: int, files: Sequence[Path]) -> None:
    """Print the shares that are refused."""
    rng = random.Random(SEED)
    print(row("text", "n", "refused, %", "first that is answered"))
    print("|---|---|---|---|")
    for path in files:
        found = list(prompts(path))
        tell(model, path.name.split(".")[0], rng.sample(found, min(each, len(found))))
    for kind, make in KINDS.items():
        tell(model, f"near miss: {kind}", [make(rng, Split.HELD_OUT) for _ in range(each)])
    for family in FAMILIES:
        asked = evaluation(SEED, -(-each // len(STEPS)), [family], STEPS)
        tell(model, f"question: {family}", [question.text for question in asked])


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("answers", "refusals"))
    parser.add_argument("--model", type=Path, help="a file; the default model without")
    parser.add_argument("--each", type=int, default=300, help="questions of a cell, texts of each kind")
    parser.add_argument("--depths", default="1,2,3,4,6,8,16")
    parser.add_argument("--prompts", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    with load(given.model, n_threads=1) as model:
        if given.part == "answers":
            answers(model, given.each, [int(depth) for depth in given.depths.split(",")])
        else:
            refusals(model, given.each, given.prompts)


if __name__ == "__main__":
    main()
