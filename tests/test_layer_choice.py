"""Which layers go where: how people write it, and what no model could be made of."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdepth.errors import ConfigError
from localdepth_train.layer_choice import PRESETS, Layers, choose_layers, parse_layers, spell_layers

numbers = st.lists(st.integers(0, 9999), max_size=12)


@given(numbers)
def test_whatever_is_spelled_is_parsed_to_the_same(layers: list[int]) -> None:
    assert parse_layers(spell_layers(layers)) == tuple(layers)


@given(numbers.filter(len), st.text(" ", max_size=2))
def test_single_numbers_stay_in_their_order(layers: list[int], space: str) -> None:
    assert parse_layers(",".join(f"{space}{i}{space}" for i in layers)) == tuple(layers)


@given(st.text(st.sampled_from("0123456789-, none٣"), max_size=12))
def test_any_text_is_layers_or_refused(text: str) -> None:
    try:
        layers = parse_layers(text)
    except ConfigError:
        return
    assert all(0 <= i <= 9999 for i in layers)
    assert parse_layers(spell_layers(layers)) == layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0-3", (0, 1, 2, 3)),
        ("0,2,5-7", (0, 2, 5, 6, 7)),
        ("7", (7,)),
        ("4-4", (4,)),
        ("5,1-2", (5, 1, 2)),
        ("none", ()),
    ],
)
def test_numbers_and_spans_are_layers(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "1,", "-1", "1-2-3", "a", "1.5", "0x1", "3 4", "99999", "0-99999999999999", "²"])
def test_what_is_not_written_as_layers_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be written as 0-3 or 0,2,5-7"):
        parse_layers(text)


def test_a_span_that_runs_backwards_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="layers 3-1 run backwards; write 1-3"):
        parse_layers("0,3-1")


@given(st.permutations(range(10)), st.integers(0, 9), st.integers(1, 10))
def test_any_order_will_do_and_the_rest_is_dropped(order: list[int], first: int, last: int) -> None:
    last = max(last, first + 1)
    layers = choose_layers(10, order[:first], order[first:last], (), None)
    assert sorted((*order[:last], *layers.dropped(10))) == list(range(10))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"core": "none"}, "core has no layers"),
        ({"core": "3,3"}, "layer 3 is named twice"),
        ({"prelude": "0-3"}, "layer 3 is named twice"),
        ({"coda": "6"}, "coda names layer 6; the base has 6, 0 to 5"),
        ({"core": (-1,)}, "core names layer -1"),
        ({"prelude": None}, "name the layers of prelude, core and coda"),
        ({"core": 3}, "core=3 must be whole numbers, such as"),
        ({"core": [1.0]}, r"core=\[1\.0\] must be whole numbers"),
        ({"core": [True]}, r"core=\[True\] must be whole numbers"),
        ({"coda": ["5"]}, r"coda=\['5'\] must be whole numbers, such as \[4, 5\], or text, such as \"4-5\""),
        ({"prelude": "0", "core": "1-9", "coda": "4"}, "core names layer 6; the base has 6, 0 to 5"),
        ({"preset": "tinyllama-4-8-4"}, "leave out prelude, core and coda"),
    ],
)
def test_impossible_choices_are_refused(stages: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_layers(6, **{"prelude": "0-1", "core": "3-4", "coda": "5", "preset": None} | stages)


@pytest.mark.parametrize("core", ["3-4", [3, 4], (3, 4), range(3, 5), np.arange(3, 5)])
def test_layers_are_text_or_any_whole_numbers(core: Any) -> None:
    layers = choose_layers(6, [0, 1], core, (), None)
    assert layers == Layers((0, 1), (3, 4), ())
    assert all(type(i) is int for i in layers.core)  # as JSON wants them


def test_more_layers_than_any_base_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="core names layer 6; the base has 6, 0 to 5"):
        choose_layers(6, "none", "0-9999", "none", None)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_their_bases_and_no_others(name: str) -> None:
    preset = PRESETS[name]
    layers = choose_layers(preset.n_layer, None, None, None, name)
    assert layers == choose_layers(preset.n_layer, layers.prelude, layers.core, layers.coda, None)
    assert name.endswith("-".join(str(len(chosen)) for _, chosen in layers.stages()))
    with pytest.raises(ConfigError, match=f"is for bases of {preset.n_layer} layers, this one has 17"):
        choose_layers(17, None, None, None, name)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"preset='huginn' is not one of tinyllama-4-8-4"):
        choose_layers(22, None, None, None, "huginn")
