"""A training step: against a straightforward loop over the same blocks, what sharing the work gains, what it needs.

    python -m tests.bench.training [PART ...] [--turns 9] [--seconds 8] [--small]

Parts, all of them where none is named:

*loop*: speed of our trainer and of ``PlainLoop``, which computes the same batches at the same depths with the same
optimisers, and where our time goes. The losses must be the same, or the benchmark stops.
*ways*: what bfloat16 gains, and two threads: torch's own inside every operation, or two micro-batches side by side.
*processes*: two of them, as ``accelerate launch`` starts them, against two threads of one, on the same batches.
*memory*: the peak of a step, by depth, by passes with gradient and by micro-batches. Torch counts its tensors: exact
to the byte, where the resident set of a process also holds what the C library has not given back.

Machines are shared: sides take turns, and a ratio is the median over steps that both made. A race ends after
``--turns``, or after ``--seconds`` once every side had two. CPU time says what a step costs, whoever else computes;
what threads gain by the clock on the wall is seen on idle cores alone.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

from localdepth.config import ModelConfig
from localdepth_train.depth_sampler import sample_passes, seeded
from localdepth_train.recipe import DepthRecipe, OptimizerRecipe, Recipe, load_recipe
from localdepth_train.sources import open_source
from localdepth_train.start import Start
from localdepth_train.tasks import evaluation
from localdepth_train.tasks.vocabulary import train_tokenizer
from localdepth_train.text.packing import IGNORED
from localdepth_train.trainer import Trainer
from tests.training import DEFAULT, changed, start_folder, text_recipe

__all__ = ["main"]

SAME_LOSS = 1e-4  # relative; rounding, which optimisers amplify from step to step
MIB = 2**20
MEAN_DEPTH, BACKPROP = 8, 4  # of text
TIMED, WEIGHED = (256, 4096, 8, 128), (512, 8192, 4, 128)  # of text: n_embd, n_vocab, rows of a step, tokens of a row
SMALL = (64, 1536, 4, 16)
OUTER = ("token_embd.weight", "output.weight")  # matrices that Muon leaves alone
ENVIRONMENT = {  # read when torch is imported
    "GOMP_SPINCOUNT": "1000",  # threads of torch that wait give way to others; else a busy machine all but stops them
    "KINETO_LOG_LEVEL": "6",  # the profiler does not tell when it starts and stops
}


class PlainLoop:
    """What a researcher would write: a loop over the same blocks with torch's own pieces, no more."""

    def __init__(self, recipe: Recipe) -> None:
        [self.phase] = recipe.phases
        start = Start.of(recipe)
        self.model, self.source = start.model, open_source(recipe, self.phase, start, 0, 1)
        self.optimizers = torch_optimizers(self.model, self.phase.optimizer)
        self.n_parts = recipe.micro_batches
        self.n_steps = self.n_tokens = 0

    def advance(self) -> dict[str, float]:
        """One optimiser step; returns its loss."""
        model, depth, total = self.model, self.phase.depth, 0.0
        batches = self.source.draw(self.n_steps)
        n_labels = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
        for i, batch in enumerate(batches):
            generator = seeded(self.n_steps * self.n_parts + i + 1)
            n_nograd, k_grad = sample_passes(depth.mean, depth.backprop, generator, depth.sigma)
            e = model.embeds(batch.ids)
            s = torch.zeros_like(e)
            with torch.no_grad():
                for r in range(n_nograd):
                    s = model.core_pass(s, e, r)
            for r in range(n_nograd, n_nograd + k_grad):
                s = model.core_pass(s, e, r)
            logits, labels = model.logits(s).flatten(0, 1), batch.labels.flatten()
            loss = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / n_labels
            loss.backward()
            total += loss.item()
            self.n_tokens += batch.ids.numel()
        clip_grad_norm_(model.parameters(), self.phase.optimizer.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.n_steps += 1
        return {"loss": total}


def torch_optimizers(model: nn.Module, plan: OptimizerRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the model where the recipe wants it, AdamW for the rest."""
    rest = dict(model.named_parameters())
    chosen: list[torch.optim.Optimizer] = []
    if plan.muon_lr:
        inner = [rest.pop(name) for name, p in list(rest.items()) if p.ndim == 2 and name not in OUTER]
        chosen.append(torch.optim.Muon(inner, plan.muon_lr, plan.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return [*chosen, torch.optim.AdamW(rest.values(), plan.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0)]


Loop = Trainer | PlainLoop


@dataclass(slots=True)
class Pace:
    """What one side of a race did, step by step."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads, waiting by spinning included
    losses: list[float] = field(default_factory=list)

    def step(self, loop: Loop) -> None:
        """Let ``loop`` make one step and note it."""
        tokens, cpu_began, began = loop.n_tokens, time.process_time(), time.perf_counter()
        self.losses.append(loop.advance()["loss"])
        self.seconds.append(time.perf_counter() - began)
        self.cpu_seconds.append(time.process_time() - cpu_began)
        self.tokens.append(loop.n_tokens - tokens)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How many times as fast we were, by the seconds of each step."""
    return median(other / one for one, other in zip(ours, theirs, strict=True))


@dataclass(frozen=True, slots=True)
class Bench:
    """Where models lie, and how long to measure."""

    folder: Path
    turns: int
    seconds: float
    small: bool

    @classmethod
    def prepared(cls, folder: Path, turns: int, seconds: float, small: bool) -> "Bench":
        """Write text, and a tokenizer for all."""
        asked = evaluation(0, 40, steps=(2, 4, 6, 8))
        rows = (json.dumps({"text": f"{q.text} {q.answer}"}) + "\n" for q in asked)
        (folder / "text.jsonl").write_text("".join(rows))
        model = load_recipe(DEFAULT).model
        assert model is not None
        (folder / "tokenizer.json").write_text(train_tokenizer(model.n_vocab, 0).to_str())
        return cls(folder, turns, seconds, small)

    def questions(self) -> Recipe:
        """The default model at full depth and on its longest questions, on one thread in float32."""
        recipe = load_recipe(DEFAULT)
        [phase] = recipe.phases
        assert phase.tasks is not None
        assert recipe.model is not None
        growth = replace(phase.tasks.question_steps, start=phase.tasks.question_steps.top)
        start, n_rows = str(self._start(recipe.model)), 8 if self.small else recipe.batch_size
        return changed(
            replace(recipe, threads=1, bf16=False, batch_size=n_rows, model=None, start=start),
            depth=replace(phase.depth, follow_steps=False),
            tasks=replace(phase.tasks, question_steps=growth),
            optimizer=replace(phase.optimizer, warmup=0.0, cooldown=0.0),
        )

    def text(self, size: tuple[int, int, int, int]) -> Recipe:
        """Two layers in every stage, rows full of documents, AdamW."""
        n_embd, n_vocab, n_rows, n_tokens = SMALL if self.small else size
        base = load_recipe(DEFAULT).model
        assert base is not None
        n_head = n_embd // 64
        base = replace(base, n_prelude=2, n_core=2, n_coda=2, n_head=n_head, n_head_kv=n_head, head_dim=64)
        config = replace(base, n_embd=n_embd, n_ff=3 * n_embd, n_vocab=n_vocab)
        recipe = text_recipe(self._start(config), self.folder / "text.jsonl", batch_size=n_rows)
        phase = recipe.phases[0]
        assert phase.text is not None
        text = replace(phase.text, n_tokens=n_tokens, isolate=False)
        depth, optimizer = DepthRecipe(mean=MEAN_DEPTH, backprop=BACKPROP), OptimizerRecipe(adamw_lr=1e-4)
        return replace(recipe, phases=(replace(phase, steps=1000, text=text, depth=depth, optimizer=optimizer),))

    def race(self, sides: Mapping[str, tuple[Loop, int]]) -> dict[str, Pace]:
        """Steps of every loop with so many threads of torch, in turns."""
        paces = {name: Pace() for name in sides}
        threads_before, began = torch.get_num_threads(), time.perf_counter()
        for turn in range(self.turns):
            if turn >= 2 and time.perf_counter() - began > self.seconds:
                break
            for name, (loop, threads) in sides.items():
                torch.set_num_threads(threads)
                paces[name].step(loop)
        torch.set_num_threads(threads_before)
        return paces

    def _start(self, config: ModelConfig) -> Path:
        path = self.folder / str(config.n_embd)
        if not path.exists():
            start_folder(path, config, (self.folder / "tokenizer.json").read_text())
        return path


def warm(loop: Loop) -> Loop:
    """The loop after a step that measures nothing."""
    loop.advance()
    return loop


@contextmanager
def watching(trainer: Trainer) -> Iterator[dict[str, float]]:
    """CPU seconds that parts of the trainer's steps take meanwhile."""
    taken: dict[str, float] = defaultdict(float)

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **settings: Any) -> Any:
            began = time.process_time()
            try:
                return call(*args, **settings)
            finally:
                taken[name] += time.process_time() - began

        return timed

    places = {
        "data": (trainer.source, "draw"),
        "forward": (trainer.objective, "forward"),
        "backward": (trainer.team, "gradients"),
        "clip": (nn.utils, "clip_grad_norm_"),
        "optimiser": (trainer.optimizers, "step"),
    }
    with ExitStack() as stack:
        for name, (owner, attribute) in places.items():
            stack.enter_context(patch.object(owner, attribute, watched(name, getattr(owner, attribute))))
        yield taken
    taken["backward"] -= taken["forward"]  # which is a part of it


def compare_loops(bench: Bench) -> None:
    """Print our speed, the straightforward loop's, and our parts."""
    print("\n| step | threads | trainer, tokens per CPU second | loop | trainer / loop | the trainer's time |")
    print("|---|---|---|---|---|---|")
    for name, recipe in {"questions": bench.questions(), "text": bench.text(TIMED)}.items():
        trainer, plain = Trainer(recipe), PlainLoop(recipe)
        sides: dict[str, Loop] = {"trainer": warm(trainer), "loop": warm(plain)}
        for threads in (1, 2):
            with watching(trainer) as parts:
                ours, theirs = bench.race({side: (loop, threads) for side, loop in sides.items()}).values()
            for one, other in zip(ours.losses, theirs.losses, strict=True):
                if abs(one - other) > SAME_LOSS * other:
                    raise SystemExit(f"{name}: the trainer's loss is {one}, the loop's {other}")
            whole = sum(ours.cpu_seconds)
            parts["the rest"] = whole - sum(parts.values())
            shares = ", ".join(f"{part} {100 * taken / whole:.1f} %" for part, taken in parts.items())
            speeds = " | ".join(f"{sum(pace.tokens) / sum(pace.cpu_seconds):,.0f}" for pace in (ours, theirs))
            faster = ratio(ours.cpu_seconds, theirs.cpu_seconds)
            print(f"| {name} | {threads} | {speeds} | {faster:.3f} | {shares} |", flush=True)


def compare_ways(bench: Bench) -> None:
    """Print what threads, bfloat16 and other settings do to the speed."""
    shared = {"one thread": (1, 1), "torch's two threads": (1, 2), "two micro-batches side by side": (2, 1)}
    question_sides = {
        f"{name}, {kind}": (replace(bench.questions(), threads=threads, bf16=kind == "bfloat16"), torch_threads)
        for kind in ("float32", "bfloat16")
        for name, (threads, torch_threads) in shared.items()
    }
    text = bench.text(TIMED)
    plan = text.phases[0].text
    assert plan is not None
    text_sides = {
        "float32": (text, 1),
        "bfloat16": (replace(text, bf16=True), 1),
        "recompute": (replace(text, recompute=True), 1),
        "documents kept apart": (changed(text, text=replace(plan, isolate=True)), 1),
    }
    for title, recipes in {"questions": question_sides, "text, one thread": text_sides}.items():
        print_paces(title, bench.race({name: (warm(Trainer(recipe)), n) for name, (recipe, n) in recipes.items()}))


def compare_processes(bench: Bench) -> None:
    """Print the speed of two threads and of two processes on the same batches."""
    two = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    paces = {"two threads": member_pace(bench, ()), "two processes": member_pace(bench, two)}
    print_paces("questions, float32", paces)


def print_paces(title: str, paces: Mapping[str, Pace]) -> None:
    """A table of paces, compared with the first."""
    print(f"\n| {title} | tokens/s | times as fast | tokens per CPU second | times as cheap |\n|---|---|---|---|---|")
    [first, *_] = paces.values()
    for name, pace in paces.items():
        fast = f"{sum(pace.tokens) / sum(pace.seconds):,.0f} | {ratio(pace.seconds, first.seconds):.2f}"
        cheap = f"{sum(pace.tokens) / sum(pace.cpu_seconds):,.0f} | {ratio(pace.cpu_seconds, first.cpu_seconds):.2f}"
        print(f"| {name} | {fast} | {cheap} |", flush=True)


def member_pace(bench: Bench, launcher: Sequence[str]) -> Pace:
    """Steps of a trainer in fresh processes."""
    own = ["tests.bench.training", "--member", str(bench.folder), "--turns", str(bench.turns)]
    command = [sys.executable, "-m", *launcher, *own, *(["--small"] if bench.small else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Pace(**json.loads(done.stdout))


def run_member(bench: Bench) -> None:
    """Train as one of those processes; the first prints how it went."""
    recipe = replace(bench.questions(), threads=2, micro_batches=4)  # as many for each of two processes
    trainer, pace = Trainer(recipe), Pace()
    torch.set_num_threads(1)
    warm(trainer)
    for _ in range(bench.turns):
        pace.step(trainer)
    pace.cpu_seconds = [sum(seconds) for seconds in zip(*trainer.team.gather(pace.cpu_seconds), strict=True)]
    if trainer.team.rank == 0:
        print(json.dumps(asdict(pace)))


def weigh(bench: Bench) -> None:
    """Print the peak of a step by what decides it."""
    recipe = replace(bench.text(WEIGHED), micro_batches=1)
    n_bytes = sum(4 * p.numel() for p in Trainer(recipe).model.parameters())
    print(
        f"\nPeak in MiB above weights and optimiser; {n_bytes / MIB:.1f} of it are gradients, as large as the weights."
    )

    def at(n_passes: int, k_grad: int, recompute: bool = False) -> float:
        depth = DepthRecipe(mean=n_passes, backprop=k_grad, fixed=True)
        return peak(bench, replace(changed(recipe, depth=depth), recompute=recompute))

    print(f"\n| passes, {BACKPROP} of them with gradient | peak |\n|---|---|")
    for n_passes in (4, 8, 32):
        print(f"| {n_passes} | {at(n_passes, BACKPROP):.1f} |", flush=True)
    print("\n| passes, all with gradient | peak | peak with recompute |\n|---|---|---|")
    for n_passes in (1, 4, 16):
        print(f"| {n_passes} | {at(n_passes, n_passes):.1f} | {at(n_passes, n_passes, True):.1f} |", flush=True)
    print("\n| micro-batches of one row | peak |\n|---|---|")
    for n in (1, 2, 4):
        print(f"| {n} | {peak(bench, replace(recipe, batch_size=n, micro_batches=n)):.1f} |", flush=True)


def peak(bench: Bench, recipe: Recipe) -> float:
    """Most MiB of tensors during a step, beyond those there before it."""
    trainer, trace = Trainer(recipe), bench.folder / "trace.json"
    warm(trainer)  # the optimiser's state is made in the first step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer.advance()
    seen.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    counts = [event["args"] for event in sorted(events, key=lambda event: event["ts"])]
    before = counts[0]["Total Allocated"] - counts[0]["Bytes"]
    return float(max(count["Total Allocated"] for count in counts) - before) / MIB


PARTS = {"loop": compare_loops, "ways": compare_ways, "processes": compare_processes, "memory": weigh}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of the parts that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--small", action="store_true", help="seconds of everything, to see that it runs")
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.member:
        run_member(Bench(given.member, given.turns, given.seconds, given.small))
        return
    with TemporaryDirectory() as folder:
        bench = Bench.prepared(Path(folder), given.turns, given.seconds, given.small)
        for part in given.parts or PARTS:
            PARTS[part](bench)


if __name__ == "__main__":
    if not ENVIRONMENT.keys() <= os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, ENVIRONMENT | os.environ)
    main()
