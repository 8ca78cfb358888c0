"""What the default model refuses: other people's prompts and near misses, which it should, and questions, which not.

    python -m tests.bench.refusals [--model FILE] [--each 300] [--prompts FILE ...]

Prompt files are JSONL with ``prompt`` or ``turns`` in each line, or CSV with a column ``prompt``, plain or gzipped.
Prompts longer than the context are cut to it. Near misses are generated with compositions and names that training never
showed; the sentences and words that spoil them are those of training. Questions are held out, one to eight steps.
"""

import argparse
import csv
import gzip
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from localdepth.loading import load
from localdepth.model import Model
from localdepth_train.tasks import TRAINED_STEPS, Split, evaluation
from localdepth_train.tasks.families import FAMILIES
from localdepth_train.tasks.near_miss import KINDS
from localdepth_train.tasks.off_topic import REFUSAL

DEPTH = 16
SEED = 20270103
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
    print(f"| {name} | {len(answers)} | {share:.1f} | {example} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a file; the default model without")
    parser.add_argument("--each", type=int, default=300, help="texts of each kind, and of each file at most")
    parser.add_argument("--prompts", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    rng = random.Random(SEED)
    print("| text | n | refused, % | first that is answered |\n|---|---|---|---|")
    with load(given.model, n_threads=1) as model:
        for path in given.prompts:
            found = list(prompts(path))
            tell(model, path.name.split(".")[0], rng.sample(found, min(given.each, len(found))))
        for kind, make in KINDS.items():
            tell(model, f"near miss: {kind}", [make(rng, Split.HELD_OUT) for _ in range(given.each)])
        steps = range(1, TRAINED_STEPS + 1)
        for family in FAMILIES:
            asked = evaluation(SEED, -(-given.each // TRAINED_STEPS), [family], steps)
            tell(model, f"question: {family}", [question.text for question in asked])


if __name__ == "__main__":
    main()
