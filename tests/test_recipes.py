"""A recipe is one text, one quant for each stage, and falls back where rows hold no block."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdepth.errors import ConfigError
from localdepth.quant import Quant
from localdepth_export.recipe import Recipe
from tests.published import EXPECTED

CONFIG = replace(EXPECTED["retrofit_llama"], n_embd=256, head_dim=64, n_ff=512)


@given(st.builds(Recipe, *[st.sampled_from(Quant)] * 6))
def test_a_recipe_is_what_its_text_says(recipe: Recipe) -> None:
    assert Recipe.parse(str(recipe)) == recipe


def test_the_text_names_what_differs() -> None:
    assert str(Recipe.parse("q4_k")) == "Q4_K"
    assert str(Recipe.parse("q4_k, head=q8_0 ,Core=Q6_K")) == "Q4_K,core=Q6_K,head=Q8_0"
    assert str(Recipe.parse("Q4_K,core=Q4_K")) == "Q4_K"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Q3_K", "'Q3_K' .* not one of F32, F16"),
        ("", "not one of"),
        ("Q4_K,core", "not STAGE=QUANT"),
        ("Q4_K,loop=Q8_0", "a stage of embed, prelude, injection, core, coda, head"),
        ("Q4_K,core=Q9", "'Q9' .* not one of"),
        ("Q4_K,core=Q8_0,core=F16", "names core twice"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.parse(text)


def test_every_stage_gets_its_own_quant() -> None:
    recipe = Recipe(
        embed=Quant.Q8_0, prelude=Quant.Q4_0, injection=Quant.F16, core=Quant.Q6_K, coda=Quant.Q4_K, head=Quant.Q5_K
    )
    chosen, fallbacks = recipe.choose(CONFIG)
    assert fallbacks == ()
    assert chosen["token_embd.weight"] is Quant.Q8_0
    assert chosen["prelude.1.ffn_up.weight"] is Quant.Q4_0
    assert {chosen["injection.state.weight"], chosen["injection.embeds.weight"]} == {Quant.F16}
    assert chosen["core.0.attn_q.weight"] is Quant.Q6_K
    assert chosen["coda.0.ffn_down.weight"] is Quant.Q4_K
    assert chosen["output.weight"] is Quant.Q5_K
    assert {chosen[name] for name, shape in CONFIG.tensors().items() if len(shape) == 1} == {Quant.F32}


def test_a_tied_head_takes_the_finer_of_its_two_quants() -> None:
    tied = replace(CONFIG, tied_head=True)
    for text in ("Q4_K,head=Q8_0", "Q4_K,embed=Q8_0"):
        assert Recipe.parse(text).choose(tied)[0]["token_embd.weight"] is Quant.Q8_0


@pytest.mark.parametrize(
    ("quant", "n_embd", "stored"),
    [
        ("Q4_K", 96, "Q5_0"),
        ("Q5_K", 96, "Q8_0"),
        ("Q6_K", 96, "Q8_0"),
        *((quant, 48, "F16") for quant in ("Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K")),
    ],
)
def test_rows_without_whole_blocks_fall_back_to_the_next_finer_quant(quant: str, n_embd: int, stored: str) -> None:
    config = replace(CONFIG, n_embd=n_embd)
    chosen, fallbacks = Recipe.parse(quant).choose(config)
    assert chosen["token_embd.weight"] is Quant(stored)
    assert f"token_embd.weight: {quant} -> {stored}" in fallbacks
    assert chosen["core.0.ffn_down.weight"] is Quant(quant)  # its rows are of n_ff
