"""Divergence of the logits by recipe and depth, with and without importance, on two small models.

    python -m tests.bench.divergence --default CHECKPOINT
    python -m tests.bench.divergence --llama DIRECTORY --stories FILE.jsonl.gz

The first is the checkpoint of the default model, run on fresh questions with their right answers; the second a real
Llama looped by surgery (see ``tests.looped``), run on stories. Importance comes from other questions and stories than
those compared. A row of the table is a recipe, a cell the mean KL in nats and the share of equal best tokens. ONNX
folders have rows of their own; their blocks hold the numbers of Q8_0 and Q4_0.
"""

import argparse
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from localdepth.engine.base import F32
from localdepth.engine.onnx.engine import OnnxEngine
from localdepth.gguf import read
from localdepth.model import Model
from localdepth.onnx_folder import folder as onnx_folder
from localdepth.prompt import PromptReader
from localdepth_export.convert import Export, to_gguf
from localdepth_export.divergence import RECIPES, Divergence, compare, compare_recipes, run
from localdepth_export.importance import Importance, collect
from localdepth_export.onnx_graphs.convert import to_onnx
from localdepth_export.sample import Sample, limits_for, windows
from localdepth_train.tasks import evaluation
from tests.looped import loop_llama

DEPTHS = (1, 2, 4, 8, 16)
POSITIONS = 2048
ONNX_BITS = ((16, None), (8, None), (4, 8), (4, None))  # and of the core


def answered_questions(model: Path, seed: int) -> list[list[int]]:
    """Fresh questions of two to six steps with their right answers, as the default model reads them."""
    with read(model) as file:
        reader = PromptReader(file.tokenizer, file.config.n_vocab)
    assert reader.tokenizer is not None
    asked = evaluation(seed, 4, steps=(2, 4, 6))
    return [[*reader.read(q.text).ids, *reader.tokenizer.encode(q.answer)] for q in asked]


def stories(file: Path) -> Iterable[str]:
    """The texts of a JSONL file."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        yield from (json.loads(line)["text"] for line in lines)


def show(checkpoint: Path, recipes: Sequence[str], sample: Sample, importance: Importance) -> None:
    """Print the table of one model, once plainly and once with importance."""
    for given in (None, importance):
        print(f"\nwith importance from {given.origin}" if given else "\nwithout importance")
        heading()
        outcomes = compare_recipes(
            checkpoint, sample, recipes=recipes, depths=DEPTHS, importance=given, max_tokens=POSITIONS
        )
        for outcome in outcomes:
            print_row(outcome.recipe, outcome.bits, outcome.by_depth.values())


def show_onnx(checkpoint: Path, sample: Sample) -> None:
    """Print the same table of ONNX folders."""
    print("\nONNX")
    heading()
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "onnx"
        to_onnx(checkpoint, folder)
        with onnx_folder.read(folder) as opened:
            cut = windows(sample, opened, POSITIONS)
        expected = onnx_logits(folder, cut)
        for bits, core_bits in ONNX_BITS:
            made = to_onnx(checkpoint, folder, bits=bits, core_bits=core_bits)
            tell(made, onnx_logits(folder, cut), expected)


def onnx_logits(folder: Path, cut: Sequence[Sequence[int]]) -> dict[int, F32]:
    """What our engine makes of a folder, by depth."""
    with onnx_folder.read(folder) as opened:
        engine = OnnxEngine(opened, limits_for(cut, DEPTHS))
    with Model(engine, PromptReader(None, engine.config.n_vocab)) as model:
        return {depth: run(model, cut, depth) for depth in DEPTHS}


def tell(made: Export, logits: Mapping[int, F32], expected: Mapping[int, F32]) -> None:
    """Print the row of a folder; bits are those of its tensors alone."""
    with onnx_folder.read(made.path) as folder:
        bits = 8 * sum(folder.bytes_by_quant.values()) / made.n_params
    print_row(made.quant, bits, [compare(logits[depth], expected[depth]) for depth in DEPTHS])


def heading() -> None:
    """Print the head of a table."""
    print("| recipe | bits |" + "".join(f" depth {depth} |" for depth in DEPTHS))
    print("|---|---|" + "---|" * len(DEPTHS))


def print_row(recipe: str, bits: float, found: Iterable[Divergence]) -> None:
    """Print a line of a table."""
    cells = (f" {one.kl:.1e}, {100 * one.top1:.1f} % |" for one in found)
    print(f"| {recipe} | {bits:.2f} |" + "".join(cells), flush=True)


def main() -> None:
    """Print the tables of the models that are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--default", type=Path, help="checkpoint of the default model")
    parser.add_argument("--llama", type=Path, help="Hugging Face directory of a Llama")
    parser.add_argument("--stories", type=Path, help="gzipped JSONL with a text in each line")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        model = Path(folder) / "f32.gguf"
        if arguments.default:
            print(f"default model, {POSITIONS} positions of answered questions")
            to_gguf(arguments.default, model, quant="F32")
            importance = collect(model, answered_questions(model, 1), depths=DEPTHS)
            show(arguments.default, RECIPES, answered_questions(model, 0), importance)
            show_onnx(arguments.default, answered_questions(model, 0))
        if arguments.llama:
            print(f"\n{arguments.llama.name} looped, {POSITIONS} positions of stories")
            checkpoint = loop_llama(arguments.llama, Path(folder) / "looped")
            to_gguf(checkpoint, model, quant="F32")
            texts = list(stories(arguments.stories))
            importance = collect(model, "\n".join(texts[100:200]), depths=DEPTHS)
            show(checkpoint, RECIPES, "\n".join(texts[:10]), importance)
            show_onnx(checkpoint, "\n".join(texts[:10]))


if __name__ == "__main__":
    main()
