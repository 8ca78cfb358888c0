"""What tests of the trainer share: recipes that take seconds, a checkpoint to start from, and a run to kill.

python -m tests.training RECIPE FOLDER        # runs a recipe as its users do, on one thread
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from localdepth.config import ModelConfig
from localdepth.engine.toy import random_weights
from localdepth_train.checkpoint import save
from localdepth_train.recipe import EvaluationRecipe, Recipe, load_recipe, parse_recipe
from localdepth_train.trainer import train
from tests.published import EXPECTED

__all__ = [
    "CLOCKS",
    "DEFAULT",
    "HEAL_CONFIG",
    "changed",
    "heal_recipe",
    "losses",
    "on_text",
    "records",
    "start_folder",
    "text_of",
    "text_recipe",
    "tiny_recipe",
    "toml",
]

DEFAULT = Path(__file__).parents[1] / "export/localdepth_train/recipes/default.toml"
HEAL_CONFIG = replace(EXPECTED["retrofit_llama"], n_vocab=300, n_ctx=64)  # starts from random states
CLOCKS = ("seconds", "cpu_seconds", "tokens_per_second")


def tiny_recipe() -> Recipe:
    """The default recipe, shrunk to seconds."""
    recipe = load_recipe(DEFAULT)
    [phase] = recipe.phases
    assert recipe.model is not None
    assert phase.tasks is not None
    return replace(
        recipe,
        batch_size=24,
        micro_batches=2,
        threads=1,
        bf16=False,
        save_every=4,
        evaluation=EvaluationRecipe(every=6, depths=(1, 3)),
        model=replace(recipe.model, n_embd=32, n_head=2, n_head_kv=2, head_dim=16, n_ff=32),
        phases=(
            replace(
                phase,
                steps=12,
                tasks=replace(phase.tasks, families=("turn", "day"), off_topic_share=0.05, evaluate_questions=2),
                depth=replace(phase.depth, mean=2),
                optimizer=replace(phase.optimizer, warmup=0.0, cooldown=0.2),
            ),
        ),
    )


def changed(recipe: Recipe, **values: Any) -> Recipe:
    """The recipe with another first phase."""
    return replace(recipe, phases=(replace(recipe.phases[0], **values), *recipe.phases[1:]))


def start_folder(path: Path, config: ModelConfig, tokenizer: str) -> Path:
    """A checkpoint with random weights and a tokenizer whose controls are <bos> and <eos>."""
    settings = json.dumps({"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True})
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}
    return save(path, config, random_weights(config, seed=1), files)


def text_recipe(start: Path, text: Path, **values: Any) -> Recipe:
    """Healing and target phases on one text, a dozen steps in all."""
    phase = """
    [[phases]]
    name = "{name}"
    steps = 6
    [phases.depth]
    mean = {mean}
    backprop = 2
    [phases.optimizer]
    adamw_lr = {lr}
    [phases.text]
    n_tokens = 32
    shuffle_buffer = 8
    held_out_one_in = 5
    [[phases.text.sources]]
    path = "{text}"
    """
    head = f'seed = 0\nbatch_size = 4\nmicro_batches = 2\nsave_every = 3\nstart = "{start}"\n'
    head += "[evaluation]\nevery = 6\ndepths = [1, 2]\n"
    phases = (phase.format(name=name, mean=mean, lr=lr, text=text) for name, mean, lr in _PHASES)
    return replace(parse_recipe(head + "".join(phases)), **values)


def heal_recipe(folder: Path, tokenizer: str) -> Recipe:
    """Twelve steps in two phases on a text of 120 documents; both are written into the folder."""
    rows = ({"text": f"the cat number {i} sat on the mat and ate {i % 7} oats"} for i in range(120))
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return text_recipe(start_folder(folder / "start", HEAL_CONFIG, tokenizer), folder / "text.jsonl")


def text_of(recipe: Recipe) -> Path:
    """The file that the first phase trains on."""
    text = recipe.phases[0].text
    assert text is not None
    return Path(text.sources[0].path)


def on_text(recipe: Recipe, **values: object) -> Recipe:
    """The recipe with other settings of the text in all phases."""
    plans = [(phase, phase.text) for phase in recipe.phases]
    changed_phases = (replace(phase, text=replace(text, **values)) for phase, text in plans if text)  # type: ignore[arg-type]
    return replace(recipe, phases=tuple(changed_phases))


def toml(recipe: Recipe, path: Path, steps: int = 400) -> Path:
    """A recipe file on the text of another, long enough to be killed in."""
    path.write_text(f"""
    seed = 0
    batch_size = 4
    save_every = 2
    start = "{recipe.start}"
    [evaluation]
    every = 400
    depths = [1]
    [[phases]]
    name = "heal"
    steps = {steps}
    [phases.depth]
    mean = 2
    backprop = 2
    [phases.optimizer]
    adamw_lr = 1e-3
    [phases.text]
    n_tokens = 32
    shuffle_buffer = 8
    [[phases.text.sources]]
    path = "{text_of(recipe)}"
    """)
    return path


_PHASES = (("heal", 2, 3e-3), ("target", 3, 1e-3))


def records(folder: Path) -> list[dict[str, Any]]:
    """The log without its clocks."""
    lines = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def losses(folder: Path) -> Sequence[float]:
    """Of every step in the log."""
    return [record["loss"] for record in records(folder) if "loss" in record]


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(load_recipe(sys.argv[1]), sys.argv[2])
