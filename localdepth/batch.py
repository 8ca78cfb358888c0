"""Many prompts, one answer each: a prompt that cannot be served costs nobody else's answer."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from localdepth.errors import BatchError, PromptError, RequestError
from localdepth.generate import Generation
from localdepth.prompt import Prompt

__all__ = ["one_by_one"]


def one_by_one(prompts: Iterable[Prompt], answer: Callable[[Prompt], Generation]) -> Iterator[Generation]:
    """Answers in the order of the prompts; each prompt is taken when its answer is asked for.

    Raises:
        PromptError: at once, for a single text in place of several.
        BatchError: at the end, if prompts were refused.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise PromptError(f"prompts={prompts!r:.60} must be a list or another iterable of prompts")
    return _answers(prompts, answer)


def _answers(prompts: Iterable[Prompt], answer: Callable[[Prompt], Generation]) -> Iterator[Generation]:
    errors: dict[int, RequestError] = {}
    for index, prompt in enumerate(prompts):
        try:
            done = answer(prompt)
        except RequestError as error:
            errors[index] = error
        else:
            yield replace(done, index=index)
    if errors:
        raise BatchError(errors)
