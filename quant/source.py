"""A source is a checkpoint that a command has opened: a full-precision or a quantized one."""

import logging
from dataclasses import dataclass
from pathlib import Path

from gemma3.chat import ChatFormat
from gemma3.checkpoint import CONFIG, Checkpoint, check_shapes, open_checkpoint
from gemma3.companions import Companions
from gemma3.config import ModelConfig, read_config
from gemma3.errors import BadInput
from gemma3.generation_config import GenerationConfig
from gemma3.processor_config import pan_and_scan_by_default
from gemma3.tokenizer import Tokenizer
from quant.recipe import Recipe
from quant.stored import is_quantized, load_quantized
from quant.weights import QuantizedWeights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checkpoint whose weights have the form that ships. It was opened, or made by ``quantize`` or ``qat``.

    ``path`` is the directory of its configuration and tokenizer files, for error messages and for copying the files.
    """

    path: Path
    config: ModelConfig
    companions: Companions
    weights: QuantizedWeights
    recipe: Recipe
    method: str  # how the integers were chosen: "mse", "rtn", "gptq", "qat"; in old files also "hqq"

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises BadInput as ``Companions.tokenizer`` does."""
        return self.companions.tokenizer

    @property
    def chat(self) -> ChatFormat:
        """Raises BadInput as ``Companions.chat`` does."""
        return self.companions.chat

    @property
    def generation(self) -> GenerationConfig:
        """Raises BadInput as ``Companions.generation`` does."""
        return self.companions.generation


Source = Checkpoint | QuantizedCheckpoint


def open_source(path: Path) -> Source:
    """Open the checkpoint in the directory ``path``, quantized or not.

    Raises BadInput as ``open_checkpoint`` or ``load_quantized`` does, when the weights of a quantized one do not belong
    to its config.json, and when its images are made in another way than gemma3/images.py makes them.
    """
    source = _open(path)
    vision = source.config.vision
    if vision is not None and pan_and_scan_by_default(path, vision):
        log.info("%s: asks for Pan & Scan of its images; add --pan-and-scan wherever images are given", path)
    return source


def _open(path: Path) -> Source:
    if not is_quantized(path):
        return open_checkpoint(path)
    config = read_config(path / CONFIG)
    stored = load_quantized(path)
    try:
        check_shapes(config, stored.weights.shapes)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    return QuantizedCheckpoint(path, config, Companions(path, config), stored.weights, stored.recipe, stored.method)


def full_precision(source: Source) -> Checkpoint:
    """``source`` itself. Raises BadInput when it is quantized already."""
    if isinstance(source, QuantizedCheckpoint):
        raise BadInput(f"{source.path}: is quantized already; give the checkpoint it was made of")
    return source
