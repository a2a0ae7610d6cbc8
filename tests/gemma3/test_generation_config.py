"""The oracle is transformers' GenerationConfig, and the settings with which ``generate`` samples."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig

from gemma3.errors import BadInput
from gemma3.generation_config import GENERATION_CONFIG, Sampling, read_generation_config, stop_ids
from gemma3.generation_config import GenerationConfig as Ours
from gemma3.tokenizer import Tokenizer
from tests.shapes import tiny_config

# The generation_config.json of google/gemma-3-1b-it.
RELEASED = {
    "_from_model_config": True,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "do_sample": True,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
    "top_k": 64,
    "top_p": 0.95,
    "transformers_version": "4.50.0.dev0",
}


def read(directory: Path, content: Any) -> Ours:
    (directory / GENERATION_CONFIG).write_text(content if isinstance(content, str) else json.dumps(content))
    return read_generation_config(directory)


def test_the_released_file(tmp_path: Path) -> None:
    assert read(tmp_path, RELEASED) == Ours((1, 106), Sampling(1.0, 64, 0.95), ())


def test_without_the_file_generation_is_greedy(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == Ours() == Ours((), Sampling(0.0, 0, 1.0), ())


@pytest.mark.parametrize("temperature", [None, 0.7, 1])
@pytest.mark.parametrize("top_k", [None, 0, 5])
@pytest.mark.parametrize("top_p", [None, 0.9, 1.0])
def test_sampling_is_what_transformers_would_do(
    tmp_path: Path, temperature: float | None, top_k: int | None, top_p: float | None
) -> None:
    settings = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    ours = read(tmp_path, {key: value for key, value in settings.items() if value is not None}).sampling
    tiny = Gemma3TextConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model: Any = Gemma3ForCausalLM(tiny)
    used, _ = model._prepare_generation_config(GenerationConfig.from_pretrained(tmp_path))
    assert used.do_sample
    assert ours == Sampling(used.temperature, used.top_k, used.top_p)


def test_settings_of_sampling_count_only_when_it_samples(tmp_path: Path) -> None:
    assert read(tmp_path, {"temperature": 0.7, "top_k": 5}).sampling == Sampling()
    assert read(tmp_path, {"do_sample": False, "temperature": 0.0}).sampling == Sampling()


@pytest.mark.parametrize(("given", "ids"), [(None, ()), (1, (1,)), ([1, 106, 1], (1, 106, 1)), ([], ())])
def test_eos_is_an_id_or_a_list(tmp_path: Path, given: Any, ids: tuple[int, ...]) -> None:
    assert read(tmp_path, {"eos_token_id": given}).eos_token_ids == ids


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"eos_token_id": "1"}, "eos_token_id is 1,"),
        ({"eos_token_id": [1, -1]}, "eos_token_id is"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
        ({"do_sample": True, "temperature": 0}, "temperature is 0"),
        ({"do_sample": True, "temperature": -1.0}, "temperature is -1.0"),
        ({"do_sample": True, "temperature": 10**400}, "temperature is"),
        ('{"do_sample": true, "temperature": NaN}', "holds NaN"),
        ('{"do_sample": true, "temperature": Infinity}', "holds Infinity"),
        ({"do_sample": True, "top_k": 2.5}, "top_k is 2.5"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1"),
        ({"do_sample": True, "top_p": 0}, "top_p is 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5"),
        ({"do_sample": True, "top_p": "0.9"}, "top_p is '0.9'"),
        ("[1]", "holds a JSON list"),
        ("{", "not readable as JSON"),
        ("1" * 5000, "not readable as JSON"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(tmp_path: Path, content: Any, word: str) -> None:
    with pytest.raises(BadInput, match=word) as caught:
        read(tmp_path, content)
    assert GENERATION_CONFIG in str(caught.value)


def test_settings_that_are_not_applied_are_named(tmp_path: Path) -> None:
    neutral = {"repetition_penalty": 1.0, "num_beams": 1, "min_p": None, "stop_strings": None, "max_length": 20}
    assert read(tmp_path, neutral).ignored == ()
    given = neutral | {"repetition_penalty": 1.1, "bad_words_ids": [[3]]}
    assert read(tmp_path, given).ignored == ("repetition_penalty 1.1", "bad_words_ids [[3]]")


@given(st.lists(st.integers(0, 700), max_size=4), st.lists(st.integers(0, 700), max_size=4))
def test_stop_ids_are_the_union_within_the_vocabulary(
    tokenizer: Tokenizer, in_config: list[int], in_generation: list[int]
) -> None:
    config = replace(tiny_config(), vocab_size=640, eos_token_ids=tuple(in_config))
    ids = stop_ids(config, Ours(tuple(in_generation)), tokenizer)
    assert set(ids) == {i for i in (*in_config, *in_generation, tokenizer.end_of_turn_id) if i < 640}
    assert len(set(ids)) == len(ids)
