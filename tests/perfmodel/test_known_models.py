"""Models known by name: each has as many parameters as is published of it."""

from __future__ import annotations

import pytest

from perfmodel.known_models import known_models, read_known_model

# What each model's card, or `model.num_parameters()` of its weights' class, says.
PUBLISHED = {
    "bert-large": 335_174_458,
    "gemma-2-9b": 9_241_705_984,
    "gpt-neox-20b": 20_554_567_680,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama-2-13b": 13_015_864_320,
    "llama-2-7b": 6_738_415_616,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "opt-30b": 29_974_540_288,
    "opt-6.7b": 6_658_473_984,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "t5-large": 737_668_096,
}


def test_every_known_model_is_held_against_its_published_count() -> None:
    assert list(known_models()) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_model_has_as_many_parameters_as_is_published(name: str) -> None:
    model = read_known_model(name)
    assert model.num_params == PUBLISHED[name]
    assert model.name == name
