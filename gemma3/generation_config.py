"""A checkpoint's ``generation_config.json``: the ids that end a generation, and how it is meant to be sampled.

transformers reads this file beside ``config.json``. A fine-tune may name its stop ids in one of the two only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma3.config import ModelConfig
from gemma3.errors import BadInput
from gemma3.host.files import OWN_FILE, read_optional
from gemma3.tokenizer import Tokenizer

GENERATION_CONFIG = "generation_config.json"

# Settings that are not implemented, and the values with which transformers generates as without them.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_p": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "guidance_scale": (1,),
    "sequence_bias": ([],),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "stop_strings": ([],),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "top_h": (),
    "watermarking_config": (),
    "max_time": (),
}
# transformers' values for settings that the file leaves out.
TEMPERATURE, TOP_K, TOP_P = 1.0, 50, 1.0


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn: temperature (0: greedy), ``top_k`` most likely (0: all), ``top_p`` nucleus (1: all)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class GenerationConfig:
    """What ``generation_config.json`` says. ``ignored`` has the settings that this project does not apply."""

    eos_token_ids: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    ignored: tuple[str, ...] = ()


def read_generation_config(checkpoint: Path) -> GenerationConfig:
    """The generation configuration of the checkpoint in the directory ``checkpoint``; the default without the file.

    Raises BadInput when the file is not a JSON object, and naming a setting whose value cannot be used.
    """
    path = checkpoint / GENERATION_CONFIG
    data = read_optional(path, OWN_FILE)
    try:
        return GenerationConfig(_eos_ids(data.get("eos_token_id")), _sampling(data), _ignored(data))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def stop_ids(config: ModelConfig, generation: GenerationConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a generation: those of config.json, of generation_config.json, and ``<end_of_turn>``.

    Chat models end a turn with it, and some configurations leave it out. Ids outside the vocabulary are left out: no
    model generates them, and transformers accepts them too.
    """
    ids = (*config.eos_token_ids, *generation.eos_token_ids, tokenizer.end_of_turn_id)
    return tuple(dict.fromkeys(token for token in ids if token < config.vocab_size))


def _eos_ids(given: Any) -> tuple[int, ...]:
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for one in ids:
        if not isinstance(one, int) or isinstance(one, bool) or one < 0:
            raise BadInput(f"eos_token_id is {str(given)[:60]}, expected a token id or a list of them")
    return tuple(ids)


def _sampling(data: Mapping[str, Any]) -> Sampling:
    sampled = _value(data, "do_sample", False)
    if not isinstance(sampled, bool):
        raise BadInput(f"do_sample is {str(sampled)[:60]!r}, expected true or false")
    temperature = _number(data, "temperature", TEMPERATURE)
    top_k, top_p = _number(data, "top_k", TOP_K), _number(data, "top_p", TOP_P)
    if not sampled:  # transformers does not read the other settings then
        return Sampling()
    if temperature <= 0:
        raise BadInput(f"temperature is {temperature}, expected a number over 0")
    if top_k < 0 or top_k != int(top_k):
        raise BadInput(f"top_k is {top_k}, expected an integer from 0 (off)")
    if not 0 < top_p <= 1:
        raise BadInput(f"top_p is {top_p}, expected more than 0 and at most 1 (off)")
    return Sampling(float(temperature), int(top_k), float(top_p))


def _ignored(data: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"{key} {str(data[key])[:60]}"
        for key, neutral in NEUTRAL.items()
        if data.get(key) is not None and data[key] not in neutral
    )


def _value(data: Mapping[str, Any], key: str, default: Any) -> Any:
    return default if data.get(key) is None else data[key]


def _number(data: Mapping[str, Any], key: str, default: float) -> float:
    value = _value(data, key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 2**63:
        raise BadInput(f"{key} is {str(value)[:60]!r}, expected a number")
    return value
