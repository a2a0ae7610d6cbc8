"""What transformers makes of a checkpoint: ids, logits, greedy text and stop ids."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

from gemma3.chat import Message
from tests.kinds.kind import Kind
from tests.kinds.weights import IMAGE_SIZE, TOKENS_PER_IMAGE, build

GENERATION_CONFIG = "generation_config.json"


@dataclass
class Transformers:
    """transformers' float32 model and its tokenizer, read from the files in ``directory``."""

    kind: Kind
    directory: Path
    seen: dict[str, Any] = field(default_factory=dict)  # the inputs of an image, once ``see`` was called

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.directory)

    @cached_property
    def model(self) -> Any:
        """All of its text weights come from the files, and every tensor in the files is used."""
        if self.kind.names == "compiled":  # which transformers does not read
            built = build(self.kind)
            if (self.directory / GENERATION_CONFIG).exists():
                built.generation_config = GenerationConfig.from_pretrained(self.directory)
            return built
        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
        cls: Any = Gemma3ForCausalLM if self.kind.model == "text" else Gemma3ForConditionalGeneration
        if self.kind.model == "blind":  # transformers adds a large vision model with random weights: make it small
            config: Any = Gemma3Config.from_pretrained(self.directory)
            for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
                setattr(config.vision_config, name, 1)
            options["config"] = config
        model, info = cls.from_pretrained(self.directory, **options)
        made_up = ("vision_tower", "multi_modal_projector") if self.kind.model == "blind" else ()
        assert not [name for name in info["missing_keys"] if not any(part in name for part in made_up)], info
        assert not info["unexpected_keys"], info
        assert not info["mismatched_keys"], info
        return model.eval()

    @property
    def stop_ids(self) -> set[int]:
        """The ids that end a generation."""
        return _as_set(self.model.generation_config.eos_token_id)

    @property
    def named_stop_ids(self) -> set[int]:
        """All ids that some file calls an end: the model's and those that generation_config.json adds."""
        files = [self.directory / name for name in ("config.json", GENERATION_CONFIG)]
        levels = [json.loads(path.read_text()) for path in files if path.exists()]
        levels += [levels[0].get("text_config", {})]
        return {token for level in levels for token in _as_set(level.get("eos_token_id"))}

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text).input_ids)

    def chat_ids(self, messages: Sequence[Message]) -> list[int] | None:
        """The ids of a conversation, by the processor of a multimodal model; None without a template.

        A processor adds BOS where the template does not write it.
        """
        if self.kind.model != "seeing":
            if self.tokenizer.chat_template is None:
                return None
            ids: list[int] = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_dict=False
            )
            return ids
        if (template := self._template) is None:
            return None
        inputs = self._processor.apply_chat_template(
            list(map(_in_parts, messages)) if "is string" in template else list(messages),
            chat_template=template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        return list(inputs["input_ids"][0])

    def see(self, picture: Path, text: str) -> list[int]:
        """The ids of ``picture`` followed by ``text``. From now on logits are those of the picture too."""
        inputs = self._processor(text=f"<start_of_image>{text}", images=[[Image.open(picture)]], return_tensors="pt")
        self.seen = {name: inputs[name] for name in ("pixel_values", "token_type_ids")}
        return list(inputs["input_ids"][0].tolist())

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [n, V], after each id."""
        inputs = dict(self.seen)
        if inputs:  # the ids after the picture's prompt are text
            rest = torch.zeros(1, len(ids) - inputs["token_type_ids"].shape[1], dtype=torch.int64)
            inputs["token_type_ids"] = torch.cat([inputs["token_type_ids"], rest], dim=1)
        return np.asarray(self.model(torch.tensor([list(ids)]), **inputs).logits[0].numpy())

    def greedy_text(self, ids: Sequence[int], count: int) -> str:
        """The text of at most ``count`` new tokens, without the one that ends it."""
        said = self.model.generate(torch.tensor([list(ids)]), max_new_tokens=count, do_sample=False, **self.seen)
        new = said[0, len(ids) :].tolist()
        return str(
            self.tokenizer.decode([token for token in new if token not in self.stop_ids], skip_special_tokens=True)
        )

    @property
    def _processor(self) -> Any:
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        images = Gemma3ImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        if self.kind.processor != "none":
            images = Gemma3ImageProcessorPil.from_pretrained(self.directory)
        return Gemma3Processor(images, self.tokenizer, image_seq_length=TOKENS_PER_IMAGE)

    @property
    def _template(self) -> str | None:
        path = self.directory / "chat_template.json"
        if path.exists():
            return str(json.loads(path.read_text())["chat_template"])
        return None if self.tokenizer.chat_template is None else str(self.tokenizer.get_chat_template())


def _in_parts(message: Message) -> dict[str, Any]:
    return {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}


def _as_set(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else set(ids) if isinstance(ids, list) else {ids}
