"""The public face of a loaded model: ask it, measure it. ``loading.load`` makes one."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from localdepth.batch import one_by_one
from localdepth.config import ModelConfig
from localdepth.engine.base import F32, Engine, Ids, Limits, Span
from localdepth.errors import DepthError, EngineError, PromptError, RequestError
from localdepth.generate import Generation, Request, Stream
from localdepth.loop import forward
from localdepth.memory import MemoryPlan
from localdepth.policy.base import Decision, DepthPolicy, Query
from localdepth.policy.fixed import as_policy
from localdepth.prefix import PrefixCache
from localdepth.prompt import Prompt, PromptReader, Reading
from localdepth.sampling import GREEDY, Sampling

__all__ = ["Model"]


class Model:
    """A loaded model. Thread-safe, and a context manager.

    Args:
        engine: what runs it; closed with the model.
        reader: its tokenizer and chat template.
        policy: what ``depth="auto"`` means here; None takes what the file brings.
    """

    def __init__(self, engine: Engine, reader: PromptReader, policy: DepthPolicy | None = None) -> None:
        self._engine, self._reader = engine, reader
        self._policy = policy or as_policy("auto", engine.config)
        self._prefixes = PrefixCache(engine)
        self._lock = threading.RLock()
        self._closed = False

    @property
    def config(self) -> ModelConfig:
        """What the model is."""
        return self._engine.config

    @property
    def limits(self) -> Limits:
        """How it was loaded."""
        return self._engine.limits

    def memory(self, depth: int | None = None) -> MemoryPlan:
        """Bytes the model takes with one sequence that fills its context at ``depth``; None is its default depth."""
        self._check_open()
        wanted = self.config.default_depth if depth is None else self.config.check_depth(depth, measure=True)
        return self._engine.plan(wanted)

    @property
    def has_chat_template(self) -> bool:
        """Whether the file says how messages become a prompt."""
        return self._reader.template is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine; safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._prefixes.clear()
                self._engine.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        depth: int | str | DepthPolicy = "auto",
        sampling: Sampling = GREEDY,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        state_seed: int | None = None,
        warm_start: bool = False,
        top_logprobs: int = 0,
        tags: Sequence[str] = (),
    ) -> Generation:
        """Answer a prompt; the arguments are those of ``stream``."""
        stream = self.stream(
            prompt,
            depth=depth,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            state_seed=state_seed,
            warm_start=warm_start,
            top_logprobs=top_logprobs,
            tags=tags,
        )
        return stream.collect()

    def stream(
        self,
        prompt: Prompt,
        *,
        depth: int | str | DepthPolicy = "auto",
        sampling: Sampling = GREEDY,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        state_seed: int | None = None,
        warm_start: bool = False,
        top_logprobs: int = 0,
        tags: Sequence[str] = (),
    ) -> Stream:
        """Answer a prompt token by token.

        Args:
            prompt: text (one user message where the file has a chat template), messages, or token ids.
            depth: passes of the core, 1..max_depth; "auto", "quick", "deep" or an effort word; or a policy.
            sampling: how tokens are drawn; greedy by default.
            max_tokens: tokens of the answer, at least 1; depth never spends them.
            stop: texts that end the answer and are not part of it.
            state_seed: draw s_0 of every position from the file's distribution; None starts from zeros.
            warm_start: start each generated token from the raw state of the one before.
            top_logprobs: alternatives to report with each token.
            tags: words for rules, such as "high-risk".
        Raises:
            RequestError: the request cannot be served; DepthError, PromptError, ContextOverflow, SamplingError and
                TemplateError say why.
        """
        self._check_open()
        reading = self._reader.read(prompt)
        request = Request(
            ids=reading.ids,
            decision=self._decide(depth, reading, _words(tags)),
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            state_seed=state_seed,
            warm_start=warm_start,
            top_logprobs=top_logprobs,
        )
        return Stream(self._engine, self._prefixes, self._reader.tokenizer, request, self._lock)

    def batch(
        self,
        prompts: Iterable[Prompt],
        *,
        depth: int | str | DepthPolicy = "auto",
        sampling: Sampling = GREEDY,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        state_seed: int | None = None,
        warm_start: bool = False,
        top_logprobs: int = 0,
        tags: Sequence[str] = (),
    ) -> Iterator[Generation]:
        """Answer many prompts; yields each answer when it is done, with its ``index`` among the prompts.

        Prompts are taken one by one, as answers are asked for. One that cannot be served does not stop the others:
        after the last answer one BatchError tells them all.

        Args:
            prompts: any iterable, endless ones too; each as for ``stream``, as are the settings.
        Raises:
            RequestError: at once, where no prompt could be served with these settings.
            BatchError: at the end; ``errors`` maps the index of each refused prompt to its RequestError.
        """
        as_policy(depth, self.config)
        settings = partial(
            self.stream,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            state_seed=state_seed,
            warm_start=warm_start,
            top_logprobs=top_logprobs,
            tags=tags,
        )
        settings([0], depth=1)  # computes nothing, and raises what every prompt would
        return one_by_one(prompts, lambda prompt: settings(prompt, depth=depth).collect())

    def answer_at(self, prompt: Prompt, *, depth: int, max_tokens: int = 256) -> Generation:
        """Greedy answer at any depth of the measuring range, 1..max(64, max_depth): for curves, not for use.

        Raises:
            DepthError, PromptError, ContextOverflow: as ``stream``.
        """
        self._check_open()
        decision = _measurement(self.config.check_depth(depth, measure=True))
        request = Request(ids=self._reader.read(prompt).ids, decision=decision, max_tokens=max_tokens)
        return Stream(self._engine, self._prefixes, self._reader.tokenizer, request, self._lock).collect()

    def logits(self, tokens: Sequence[int], *, depth: int, state: F32 | None = None) -> F32:
        """Logits of every position, [T, n_vocab].

        Args:
            tokens: ids, [T].
            depth: passes, 1..max(64, max_depth).
            state: s_0, [T, n_embd]; None is zeros.
        """
        with self._measuring(depth):
            return self._forward(tokens, depth, state, None)

    def states(self, tokens: Sequence[int], *, depth: int, state: F32 | None = None) -> F32:
        """Raw state after every pass, [depth, T, n_embd]; the arguments are those of ``logits``."""
        states: list[F32] = []
        with self._measuring(depth):
            self._forward(tokens, depth, state, lambda span: states.append(span.state()))
        return np.stack(states)

    def embed(self, text: str) -> F32:
        """Mean over positions of the prelude's output for plain text, [n_embd]."""
        self._check_open()
        return self._pooled(tuple(self._reader.tokenize(text)))

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text, without the chat template; pass them to ``generate`` to continue a text."""
        return self._reader.tokenize(text)

    def token_text(self, token_id: int) -> str:
        """What a token adds to a text; part of a character shows as U+FFFD.

        Raises:
            PromptError: the file has no tokenizer, or the id is outside the vocabulary.
        """
        return self._reader.token_text(token_id)

    def _decide(self, depth: int | str | DepthPolicy, reading: Reading, tags: tuple[str, ...]) -> Decision:
        policy = self._policy if depth == "auto" else as_policy(depth, self.config)
        query = Query(tokens=reading.ids, text=reading.text, tags=tags, embedding=lambda: self._pooled(reading.ids))
        decision = policy.decide(query)
        if not isinstance(decision, Decision):
            raise DepthError(f"the policy decided {decision!r}; it must return a Decision")
        self.config.check_depth(decision.floor)
        self.config.check_depth(decision.ceiling)
        return decision

    def _forward(
        self, tokens: Sequence[int], depth: int, state: F32 | None, observe: Callable[[Span], None] | None
    ) -> F32:
        kv = self._prefixes.open(depth)
        try:
            return forward(self._engine, kv, _ids(tokens), _measurement(depth), "all", _state(state), observe)[0]
        finally:
            kv.close()

    def _pooled(self, ids: tuple[int, ...]) -> F32:
        with self._lock:
            kv = self._prefixes.open(1)
            try:
                [span] = self._engine.prelude([(kv, np.array(ids, np.int32))], [None])
                pooled: F32 = span.embeds().mean(axis=0)
                self._engine.drop([span])
                return pooled
            finally:
                kv.close()

    @contextmanager
    def _measuring(self, depth: int) -> Iterator[None]:
        self._check_open()
        self.config.check_depth(depth, measure=True)
        with self._lock:
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("this model is closed; load it again")


def _measurement(depth: int) -> Decision:
    return Decision(floor=depth, ceiling=depth, chosen_by="request", reason="a measurement")


def _words(tags: Sequence[str]) -> tuple[str, ...]:
    if isinstance(tags, str) or not isinstance(tags, Sequence) or not all(isinstance(tag, str) for tag in tags):
        raise RequestError(f'tags={tags!r} must be a list of words, such as ["high-risk"]')
    return tuple(tags)


def _ids(tokens: Sequence[int]) -> Ids:
    try:
        array = np.asarray(tokens)
    except ValueError:
        array = np.empty((0, 0))
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise PromptError(f"tokens must be a flat list of token ids with at least one, got {tokens!r:.60}")
    if (array < 0).any() or (array > np.iinfo(np.int32).max).any():
        raise PromptError(f"token ids run from 0 to the vocabulary's end; got {int(array.min())}..{int(array.max())}")
    return array.astype(np.int32)


def _state(state: F32 | None) -> F32 | None:
    if state is None:
        return None
    try:
        array = np.asarray(state)
    except ValueError:
        array = np.empty(0, object)
    if array.dtype.kind not in "fiu" or not (np.abs(array) <= np.finfo(np.float32).max).all():
        raise PromptError("state must hold finite float32 numbers, [T, n_embd]")
    return array.astype(np.float32)
