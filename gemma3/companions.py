"""The files beside a checkpoint's weights that say how text goes in and out: tokenizer, chat template, generation."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gemma3.chat import ChatFormat
from gemma3.chat_template import open_format
from gemma3.config import ModelConfig
from gemma3.errors import BadInput
from gemma3.generation_config import GenerationConfig, read_generation_config
from gemma3.tokenizer import (
    END_OF_IMAGE,
    END_OF_TURN,
    IMAGE_SOFT_TOKEN,
    START_OF_IMAGE,
    START_OF_TURN,
    Tokenizer,
)


@dataclass(frozen=True)
class Companions:
    """The companions of the checkpoint in the directory ``path``. Each is read once, when it is first used.

    A checkpoint shares them with what is quantized from it: Gemma's tokenizer takes seconds to read.
    """

    path: Path
    config: ModelConfig

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises BadInput as ``read_tokenizer`` does."""
        return read_tokenizer(self.path, self.config)

    @cached_property
    def chat(self) -> ChatFormat:
        """The form of the conversations it was tuned on. Raises BadInput as ``open_format`` does."""
        return open_format(self.path, self.config.vision is not None)

    @cached_property
    def generation(self) -> GenerationConfig:
        """Its ``generation_config.json``. Raises BadInput as ``read_generation_config`` does."""
        return read_generation_config(self.path)


def read_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of the checkpoint in the directory ``path``.

    Raises BadInput as ``Tokenizer`` does, when it lacks a marker, and when it does not belong to ``config``.
    """
    tokenizer, vision = Tokenizer(path, rows=config.vocab_size), config.vision
    if tokenizer.vocab_size > config.vocab_size:
        raise BadInput(
            f"{path}: {tokenizer.path.name} has {tokenizer.vocab_size} tokens with the added ones, the embedding table "
            f"{config.vocab_size} rows; resize the table (resize_token_embeddings), or use this model's own tokenizer"
        )
    if tokenizer.bos_id != config.bos_token_id:
        raise BadInput(
            f"{path}: bos_token_id is {config.bos_token_id} in config.json, but Gemma's <bos> is token "
            f"{tokenizer.bos_id}; another BOS is not implemented, so set it to {tokenizer.bos_id} if the model was "
            "trained with <bos>"
        )
    expected: dict[str, int | None] = {START_OF_TURN: None, END_OF_TURN: None}
    if vision is not None:
        expected |= {
            START_OF_IMAGE: vision.begin_image_token_id,
            IMAGE_SOFT_TOKEN: vision.image_token_id,
            END_OF_IMAGE: vision.end_image_token_id,
        }
    for piece, token in expected.items():
        if tokenizer.special_id(piece) != token and token is not None:
            raise BadInput(
                f"{path}: {piece} is token {tokenizer.special_id(piece)} of the tokenizer, {token} in config.json; "
                "they are not of the same model"
            )
    return tokenizer
