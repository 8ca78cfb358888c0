"""The kinds of questions, as tables: where a question may start, which steps it may take, how both read.

hop    Who is Eve's friend's boss?                              facts in the weights: ``WORLD``
cup    A coin is under the red cup. Swap red and blue. Which cup hides the coin?
sum    Start with 47. Add 5. Take away 8. What is the last digit?
turn   A robot faces north. Turn left. Swap east and west. Which way does it face?
day    Today is Monday. Go 3 days forward. Go 5 days back. Which day is it?
lift   The lift is on floor 4. Go up 3. Go down 2. Which floor is it on?
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["FAMILIES", "WORLD", "Family", "Step"]

Change = Callable[[int], int | None]


@dataclass(frozen=True, slots=True)
class Step:
    """One step.

    ``key`` names it in a composition whatever its spelling, ``text`` is how it reads, ``change`` maps a state to the
    next one, or to None where the step is not possible.
    """

    key: str
    text: str
    change: Change


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of question over integer states; ``value`` names what a reader is told of a state."""

    name: str
    starts: Sequence[tuple[str, int]]  # (opening text, state)
    steps: Sequence[Step]
    closings: Sequence[str]
    answer: str  # with {} for the value
    value: Callable[[int], str]
    seen_steps: int  # compositions up to this length are facts: they have no split


_PEOPLE = (
    *("Ann", "Ben", "Cal", "Dan", "Eve", "Fay", "Gus", "Hal"),
    *("Ida", "Jon", "Kim", "Leo", "Mia", "Ned", "Pam", "Tom"),
)
_RELATIONS = {  # person i -> person; permutations without fixed points, so that no chain collapses
    "friend": (3, 14, 7, 9, 13, 11, 4, 5, 12, 8, 1, 0, 15, 6, 2, 10),
    "boss": (14, 5, 13, 7, 9, 12, 10, 15, 11, 6, 4, 2, 8, 0, 3, 1),
    "teacher": (8, 12, 3, 4, 6, 15, 10, 14, 13, 1, 9, 2, 5, 7, 0, 11),
    "doctor": (7, 13, 1, 14, 15, 10, 3, 0, 2, 12, 11, 9, 5, 8, 6, 4),
}
_CUPS = ("red", "blue", "green", "black")
_WAYS = ("north", "east", "south", "west")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

WORLD = {person: {relation: _PEOPLE[to[i]] for relation, to in _RELATIONS.items()} for i, person in enumerate(_PEOPLE)}


def _hop() -> Family:
    steps = [Step(relation, f"'s {relation}", to.__getitem__) for relation, to in _RELATIONS.items()]
    starts = [(f"Who is {person}", i) for i, person in enumerate(_PEOPLE)]
    return Family("hop", starts, steps, ["?"], "It is {}.", _PEOPLE.__getitem__, seen_steps=2)


def _cup() -> Family:
    steps = [
        Step(f"{_CUPS[min(a, b)]}-{_CUPS[max(a, b)]}", f" Swap {_CUPS[a]} and {_CUPS[b]}.", _swap(a, b))
        for a in range(len(_CUPS))
        for b in range(len(_CUPS))
        if a != b
    ]
    starts = [(f"A coin is under the {cup} cup.", i) for i, cup in enumerate(_CUPS)]
    return Family(
        "cup",
        starts,
        steps,
        [" Which cup hides the coin?", " Where is the coin?"],
        "The {} cup.",
        _CUPS.__getitem__,
        seen_steps=2,
    )


def _sum() -> Family:
    numbers = [*range(1, 10)] * 20 + [*range(10, 100)]  # two thirds have one digit
    steps = [Step(f"+{n % 10}", f" Add {n}.", _move(n, 0, 999)) for n in numbers * 2]
    steps += [
        Step(f"-{n % 10}", f" {less} {n}.", _move(-n, 0, 999)) for n in numbers for less in ("Take away", "Subtract")
    ]
    starts = [(f"Start with {n}.", n) for n in range(1, 100)]
    return Family(
        "sum",
        starts,
        steps,
        [" What is the last digit?", " Which digit is last?"],
        "It is {}.",
        lambda n: str(n % 10),
        seen_steps=1,
    )


def _turn() -> Family:
    steps = [  # the swaps do not commute with the turns
        Step("left", " Turn left.", lambda way: (way - 1) % 4),
        Step("right", " Turn right.", lambda way: (way + 1) % 4),
        Step("around", " Turn around.", lambda way: (way + 2) % 4),
        Step("east-west", " Swap east and west.", lambda way: -way % 4),
        Step("north-south", " Swap north and south.", lambda way: (2 - way) % 4),
    ]
    starts = [(f"A robot faces {way}.", i) for i, way in enumerate(_WAYS)]
    return Family(
        "turn",
        starts,
        steps,
        [" Which way does it face?", " Where does it face?"],
        "It faces {}.",
        _WAYS.__getitem__,
        seen_steps=2,
    )


def _day() -> Family:
    def go(n: int) -> Step:
        count = f"{abs(n)} day{'' if abs(n) == 1 else 's'}"
        return Step(f"{n:+d}", f" Go {count} {'forward' if n > 0 else 'back'}.", lambda day: (day + n) % 7)

    steps = [go(n) for n in range(-6, 7) if n]
    starts = [(f"Today is {day}.", i) for i, day in enumerate(_DAYS)]
    return Family(
        "day", starts, steps, [" Which day is it?", " What day is it?"], "It is {}.", _DAYS.__getitem__, seen_steps=1
    )


def _lift() -> Family:
    steps = [Step(f"{n:+d}", f" Go {'up' if n > 0 else 'down'} {abs(n)}.", _move(n, 1, 9)) for n in range(-5, 6) if n]
    starts = [(f"The lift is on floor {n}.", n) for n in range(1, 10)]
    return Family(
        "lift", starts, steps, [" Which floor is it on?", " What floor is it on?"], "Floor {}.", str, seen_steps=2
    )


def _swap(a: int, b: int) -> Change:
    return lambda cup: {a: b, b: a}.get(cup, cup)


def _move(n: int, low: int, high: int) -> Change:
    return lambda state: state + n if low <= state + n <= high else None


FAMILIES = {family.name: family for family in (_hop(), _cup(), _sum(), _turn(), _day(), _lift())}
