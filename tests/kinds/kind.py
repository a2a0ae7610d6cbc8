"""The kinds of checkpoints that people have: how each part of one may be written, and faults that must be refused.

A ``Kind`` is a set of independent choices. ``covering`` picks few kinds that hold every choice, or every pair of them.
"""

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_type_hints


@dataclass(frozen=True)
class Kind:
    """How a checkpoint is written. The defaults are what transformers 5 saves of a text model."""

    model: Literal["text", "seeing", "blind"] = "text"  # blind: a multimodal one without its vision model
    config: Literal["5", "4.57", "4.50", "merged"] = "5"  # merged: the spellings of 4 and 5 in one file
    names: Literal["saved", "in memory", "without model", "compiled"] = "saved"
    files: Literal["one", "one shard", "shards"] = "one"
    head: Literal["tied", "tied and stored", "untied", "untied inside"] = "tied"  # inside: only text_config says so
    dtype: Literal["F32", "BF16", "F16", "mixed"] = "F32"
    tokenizer: Literal["5", "5 truncating", "4", "4 slow"] = "5"  # tokenizer.json; both files; only tokenizer.model
    added: Literal["nothing", "words", "markers", "renamed"] = "nothing"
    template: Literal[
        "Gemma's", "none", "Gemma's in config", "ChatML", "ChatML over Gemma's", "named", "processor's"
    ] = "Gemma's"
    marks: Literal["none", "tools'", "generation keys"] = "none"
    generation: Literal["saved", "absent", "more stops", "sampling"] = "saved"
    window: Literal["short", "over the positions"] = "short"
    rope: Literal["default", "linear"] = "default"
    processor: Literal["none", "4", "5"] = "none"
    fault: str = "none"  # a key of FAULTS

    @property
    def possible(self) -> bool:
        """Whether some tool writes this combination."""
        sees = self.model == "seeing"
        return (
            (self.names != "in memory" or self.model != "text")
            and (self.head != "untied inside" or self.model != "text")
            and (self.names != "without model" or (self.head == "tied" and self.model != "blind"))
            and (self.processor == "none" or sees)
            and (self.tokenizer != "5 truncating" or not sees)  # a processor would truncate too
            and (self.template != "processor's" or sees)
        )

    def __str__(self) -> str:
        """The choices that are not the plain ones, as an id of a test."""
        changed = [f"{name}={value}" for name, value in vars(self).items() if value != getattr(PLAIN, name)]
        return ", ".join(changed) or "plain"


PLAIN = Kind()
CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(hint) for name, hint in get_type_hints(Kind).items() if get_args(hint)
}

# What is wrong → words that the one line of the refusal holds.
FAULTS: dict[str, tuple[str, ...]] = {
    "another head under a tie": ("lm_head.weight", "tie_word_embeddings"),
    "names of PEFT": ("PEFT",),
    "names of DataParallel": ("wrapper",),
    "a tensor missing": ("model.layers.1.mlp.up_proj.weight", "missing"),
    "a shard missing": ("model-00002-of-", "missing"),
    "a head of classes": ("score.weight",),
    "8-bit integers": ("model.layers.0.mlp.up_proj.weight", "I8"),
    "quantized by bitsandbytes": ("quantization_config",),
    "soft capping": ("final_logit_softcapping", "30"),
    "attends to both sides": ("use_bidirectional_attention",),
    "YaRN": ("yarn",),
    "another architecture": ("gemma2",),
    "no tokenizer": ("tokenizer",),
    "contradicting tokenizers": ("tokenizer.json", "tokenizer.model"),
    "a piece renamed in one file": ("<unused0>", "<|im_start|>"),
    "a table without the added words": ("4101", "4096"),
    "an added word that takes a space": ("[SCRATCH]", "rstrip"),
    "roles of TRL": ("BOS",),
    "pickled weights": ("pytorch_model.bin",),
    "an adapter alone": ("adapter",),
    "pictures of another mean": ("image_mean",),
    "pictures of another size": ("56",),
}


def singles() -> list[Kind]:
    """The plain kind, and all that differ from a plain one in one choice. Some choices need a multimodal model."""
    kinds = [PLAIN]
    for name, values in CHOICES.items():
        for value in values[1:]:
            alone = _with(PLAIN, {name: value})
            kinds.append(alone if alone.possible else _with(alone, {"model": "seeing"}))
    return kinds


def covering(strength: int, seed: int = 0) -> list[Kind]:
    """Kinds that together hold every possible combination of ``strength`` choices. The same seed gives the same ones.

    It is greedy: each kind is the one of a few random ones that holds the most combinations that no earlier one holds.
    """
    generator = random.Random(seed)
    missing = {
        combination
        for names in itertools.combinations(CHOICES, strength)
        for combination in itertools.product(*([(name, value) for value in CHOICES[name]] for name in names))
    }
    kinds: list[Kind] = []
    while missing:
        wanted = dict(min(missing))
        drawn = (_with(_random(generator), wanted) for _ in range(300))
        candidates = list(itertools.islice((kind for kind in drawn if kind.possible), 30))
        if not candidates:
            missing.remove(min(missing))  # impossible
            continue
        best = max(candidates, key=lambda kind: len(missing & _held(kind, strength)))
        missing -= _held(best, strength)
        kinds.append(best)
    return kinds


def _random(generator: random.Random) -> Kind:
    return _with(PLAIN, {name: generator.choice(values) for name, values in CHOICES.items()})


def _with(kind: Kind, choices: dict[str, str]) -> Kind:
    changes: dict[str, Any] = choices
    return replace(kind, **changes)


def _held(kind: Kind, strength: int) -> set[tuple[tuple[str, str], ...]]:
    return set(itertools.combinations(((name, getattr(kind, name)) for name in CHOICES), strength))
