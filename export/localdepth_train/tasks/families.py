"""The kinds of questions, as tables: where a question may start, which steps it may take, how both read.

hop    Who is Eve's friend's boss?                              facts in the weights: ``WORLD``
cup    A coin is under the red cup. Swap red and blue. Which cup hides the coin?
sum    Start with 47. Add 5. Take away 128. Double it. What is the last digit?
turn   The robot faces north. Turn left. Swap east and west. Which way does the robot face?
day    Today is Monday. Let 3 days pass. Go 5 days back. Which day is it?
month  The trip begins in May. Go 4 months forward. Which month is it?
lift   The lift is on floor 4. Ride up 3 floors. Go down 2. Which floor is the lift on?
grid   The piece is on c4. Go up. Step left. Which square is the piece on?
lamp   The lamp is on. Flip the switch. Leave it alone. Is the lamp on or off?

All but hop carry every fact in the question. Each kind has several openings, closings and spellings of a step, which
go with one another freely. Whoever a question is about may be anybody: a name never changes the answer.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

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
    """A kind of question over integer states; ``value`` names what a reader is told of a state.

    ``frames`` are pairs (opening, closing): ``{start}`` stands for the state at the start, as ``told`` reads it, and
    ``{who}`` for ``subject`` or a name. ``answer`` has ``{}`` for the value.
    """

    name: str
    subject: str
    frames: Sequence[tuple[str, str]]
    starts: Sequence[int]
    told: Callable[[int], str]
    steps: Sequence[Step]
    answer: str
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
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_SIDE = 5  # squares along an edge of the grid
_SQUARES = tuple(f"{file}{rank}" for rank in range(1, _SIDE + 1) for file in "abcde")
_LAMP = ("off", "on")

WORLD = {person: {relation: _PEOPLE[to[i]] for relation, to in _RELATIONS.items()} for i, person in enumerate(_PEOPLE)}


def _hop() -> Family:
    return Family(
        "hop",
        subject="",
        frames=[("Who is {start}", "?"), ("Name {start}", "."), ("I am looking for {start}", ". Who is it?")],
        starts=range(len(_PEOPLE)),
        told=_PEOPLE.__getitem__,
        steps=[Step(relation, f"'s {relation}", to.__getitem__) for relation, to in _RELATIONS.items()],
        answer="It is {}.",
        value=_PEOPLE.__getitem__,
        seen_steps=2,
    )


def _cup() -> Family:
    spellings = ("Swap {} and {}.", "Exchange the {} and {} cups.", "The {} and {} cups change places.")
    return Family(
        "cup",
        subject="the player",
        frames=_frames(
            [
                "A coin is under the {start} cup.",
                "{who} hides a coin under the {start} cup.",
                "The {start} cup has a coin.",
            ],
            ["Which cup hides the coin?", "Where is the coin?", "Under which cup is the coin now?"],
        ),
        starts=range(len(_CUPS)),
        told=_CUPS.__getitem__,
        steps=[
            Step(f"{_CUPS[min(a, b)]}-{_CUPS[max(a, b)]}", " " + text.format(_CUPS[a], _CUPS[b]), _swap(a, b))
            for text in spellings
            for a, b in product(range(len(_CUPS)), repeat=2)
            if a != b
        ],
        answer="The coin is under the {} cup.",
        value=_CUPS.__getitem__,
        seen_steps=2,
    )


def _sum() -> Family:
    numbers = [*range(1, 10)] * 50 + [*range(10, 100)] * 5 + [*range(100, 1000)]  # as many of each length, nearly
    more, less = ("Add {}.", "Plus {}.", "Increase it by {}."), ("Take away {}.", "Minus {}.", "Decrease it by {}.")
    steps = [
        Step(str(sign * n % 10), " " + text.format(n), _move(sign * n, 0, 9999))
        for sign, texts in ((1, more), (-1, less))
        for text in texts
        for n in numbers
    ]
    doubled = [Step("double", f" {text}", lambda n: 2 * n if 2 * n < 10_000 else None) for text in _DOUBLE]
    return Family(
        "sum",
        subject="the child",
        frames=_frames(
            ["Start with {start}.", "{who} writes down {start}.", "The number is {start}."],
            ["What is the last digit?", "Which digit is last?", "What is the last digit of the number?"],
        ),
        starts=numbers,
        told=str,
        steps=steps + doubled * (len(numbers) // 3),
        answer="The last digit is {}.",
        value=lambda n: str(n % 10),
        seen_steps=1,
    )


_DOUBLE = ("Double it.", "Multiply it by 2.", "Times 2.")


def _turn() -> Family:
    changes: dict[str, tuple[tuple[str, ...], Change]] = {  # the swaps do not commute with the turns
        "left": (("Turn left.", "Rotate left.", "Make a left turn."), lambda way: (way - 1) % 4),
        "right": (("Turn right.", "Rotate right.", "Make a right turn."), lambda way: (way + 1) % 4),
        "around": (("Turn around.", "Rotate twice.", "Make a half turn."), lambda way: (way + 2) % 4),
        "east-west": (("Swap east and west.", "Swap west and east.", "Exchange east and west."), lambda way: -way % 4),
        "north-south": (
            ("Swap north and south.", "Swap south and north.", "Exchange north and south."),
            lambda way: (2 - way) % 4,
        ),
    }
    return Family(
        "turn",
        subject="the robot",
        frames=_frames(
            ["{who} faces {start}.", "{who} looks {start}.", "At first {who} points {start}."],
            ["Which way does {who} face?", "Where does {who} look now?", "In which direction does {who} point?"],
        ),
        starts=range(len(_WAYS)),
        told=_WAYS.__getitem__,
        steps=_spelled(changes),
        answer="It faces {}.",
        value=_WAYS.__getitem__,
        seen_steps=2,
    )


def _calendar(name: str, unit: str, preposition: str, values: Sequence[str]) -> Family:
    forward = ("Go {} forward.", "Let {} pass.", "Move ahead {}.")
    back = ("Go {} back.", "Step back {}.", "Move {} into the past.")
    return Family(
        name,
        subject="the trip",
        frames=_frames(
            ["It is {start}.", f"{{who}} begins {preposition} {{start}}.", f"The {unit} is {{start}}."],
            [f"Which {unit} is it?", f"What {unit} is it then?", f"Which {unit} is it in the end?"],
        ),
        starts=range(len(values)),
        told=values.__getitem__,
        steps=[
            Step(str(sign * n % len(values)), " " + text.format(_count(n, unit)), _turn_wheel(sign * n, len(values)))
            for sign, texts in ((1, forward), (-1, back))
            for text in texts
            for n in range(1, 10)
        ],
        answer="It is {}.",
        value=values.__getitem__,
        seen_steps=1,
    )


def _lift() -> Family:
    up, down = (
        ("Go up {n}.", "Ride up {count}.", "Climb {count}."),
        ("Go down {n}.", "Ride down {count}.", "Sink {count}."),
    )
    return Family(
        "lift",
        subject="the lift",
        frames=_frames(
            ["{who} is on floor {start}.", "{who} starts from floor {start}.", "On floor {start} {who} waits."],
            ["Which floor is {who} on?", "What floor is it?", "On which floor does {who} end?"],
        ),
        starts=range(1, 10),
        told=str,
        steps=[
            Step(f"{sign * n:+d}", " " + text.format(n=n, count=_count(n, "floor")), _move(sign * n, 1, 9))
            for sign, texts in ((1, up), (-1, down))
            for text in texts
            for n in range(1, 6)
        ],
        answer="It is floor {}.",
        value=str,
        seen_steps=2,
    )


def _grid() -> Family:
    def step(files: int, ranks: int) -> Change:
        def change(square: int) -> int | None:
            rank, file = divmod(square, _SIDE)
            inside = 0 <= rank + ranks < _SIDE and 0 <= file + files < _SIDE
            return square + ranks * _SIDE + files if inside else None

        return change

    ways = {"up": step(0, 1), "down": step(0, -1), "left": step(-1, 0), "right": step(1, 0)}
    return Family(
        "grid",
        subject="the piece",
        frames=_frames(
            ["{who} is on {start}.", "{who} stands on square {start}.", "Put {who} on {start}."],
            ["Which square is {who} on?", "On which square does {who} stand?", "Which square is it?"],
        ),
        starts=range(len(_SQUARES)),
        told=_SQUARES.__getitem__,
        steps=_spelled({way: (tuple(f"{go} {way}." for go in ("Go", "Move", "Step")), to) for way, to in ways.items()}),
        answer="It is on {}.",
        value=_SQUARES.__getitem__,
        seen_steps=2,
    )


def _lamp() -> Family:
    changes: dict[str, tuple[tuple[str, ...], Change]] = {
        "flip": (("Flip the switch.", "Press the switch.", "Toggle it."), lambda lamp: 1 - lamp),
        "on": (("Switch it on.", "Light it."), lambda lamp: 1),
        "off": (("Switch it off.", "Put it out."), lambda lamp: 0),
        "wait": (("Leave it alone.", "Wait a minute."), lambda lamp: lamp),
    }
    return Family(
        "lamp",
        subject="the hall",
        frames=_frames(
            ["The lamp is {start}.", "{who} has a lamp that is {start}.", "A lamp of {who} is {start}."],
            ["Is the lamp on or off?", "Is it on or off now?", "How is the lamp in the end?"],
        ),
        starts=range(len(_LAMP)),
        told=_LAMP.__getitem__,
        steps=_spelled(changes),
        answer="The lamp is {}.",
        value=_LAMP.__getitem__,
        seen_steps=2,
    )


def _frames(openings: Iterable[str], closings: Iterable[str]) -> list[tuple[str, str]]:
    return [(opening, f" {closing}") for opening, closing in product(openings, closings)]


def _spelled(changes: dict[str, tuple[tuple[str, ...], Change]]) -> list[Step]:
    return [Step(key, f" {text}", change) for key, (texts, change) in changes.items() for text in texts]


def _count(n: int, unit: str) -> str:
    return f"{n} {unit}{'' if n == 1 else 's'}"


def _swap(a: int, b: int) -> Change:
    return lambda cup: {a: b, b: a}.get(cup, cup)


def _turn_wheel(n: int, length: int) -> Change:
    return lambda state: (state + n) % length


def _move(n: int, low: int, high: int) -> Change:
    return lambda state: state + n if low <= state + n <= high else None


FAMILIES = {
    family.name: family
    for family in (
        _hop(),
        _cup(),
        _sum(),
        _turn(),
        _calendar("day", "day", "on", _DAYS),
        _calendar("month", "month", "in", _MONTHS),
        _lift(),
        _grid(),
        _lamp(),
    )
}
