"""Full-precision Hugging Face checkpoints: memory-mapped safetensors, with every tensor accounted for.

quant/source.py opens quantized checkpoints too.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemma3 import names
from gemma3.chat import ChatFormat
from gemma3.companions import Companions
from gemma3.config import ModelConfig, read_config
from gemma3.errors import BadInput
from gemma3.generation_config import GenerationConfig
from gemma3.host.files import check_plain, read_json, reason
from gemma3.model import Gemma3
from gemma3.tokenizer import Tokenizer

CONFIG = "config.json"
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
AGAIN = "download it again"
GIVE = "give a Hugging Face checkpoint directory"

GIT_LFS = b"version https://git-lfs"

# Multimodal checkpoints nest the text model. These are the prefixes of the released files, then those that newer
# versions of transformers save or use in memory. The first one that matches a name is replaced.
PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("language_model.", "model."),
    *((f"{part}.", f"model.{part}.") for part in ("embed_tokens", "layers", "norm")),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    *((prefix, f"{names.VISION_TOWER}.") for prefix in (f"{names.VISION_TOWER}.", "vision_tower.")),
    *((f"model.{prefix}", f"{names.VISION_TOWER}.") for prefix in (f"{names.VISION_TOWER}.", "vision_tower.")),
)


ADAPTER = "adapter_config.json"
# Buffers that older versions of transformers stored, and that it computes now.
NOT_WEIGHTS = (".embeddings.position_ids", ".rotary_emb.inv_freq")
# torch.compile puts this before the names of what it has compiled.
COMPILED = "_orig_mod."
# What other tools put into the names of weights, and what to do then.
WRAPPERS = (
    (
        ("base_model.model.", ".lora_", ".base_layer."),
        "PEFT's names; merge the adapter (merge_and_unload) and save again",
    ),
    (("module.", "_fsdp_wrapped_module."), "the names of a wrapper; unwrap the model and save it again"),
)
# Files that stand where a checkpoint's weights are missing, and what to do then.
INSTEAD = {
    "adapter_model.safetensors": "holds an adapter without its model; merge it (merge_and_unload) and save the result",
    "adapter_model.bin": "holds an adapter without its model; merge it (merge_and_unload) and save the result",
    "pytorch_model.bin": "holds weights as pytorch_model.bin only; save them as safetensors (save_pretrained does)",
    "pytorch_model.bin.index.json": "holds weights as .bin files only; save them as safetensors (save_pretrained does)",
}


@dataclass(frozen=True)
class Checkpoint:
    """An opened full-precision checkpoint: its configuration, its tokenizer and its named tensors.

    The names are those of ``Gemma3``'s parameters. A tensor is read each time it is asked for, and the other files when
    they are first used. ``path`` is the checkpoint's directory, for error messages and for copying its other files.
    """

    path: Path
    config: ModelConfig
    companions: Companions
    _files: dict[str, Path] = field(repr=False)  # name → safetensors file
    _stored: dict[str, str] = field(repr=False)  # name → name in the file

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

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    def tensor(self, name: str) -> Tensor:
        """The tensor in its stored dtype, mapped from the file.

        Each call maps the file again, so that the pages read for a tensor are released together with it.
        """
        with safe_open(str(self._files[name]), framework="pt") as file:
            tensor: Tensor = file.get_tensor(self._stored[name])
        return tensor

    def items(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.tensor(name)) for name in self._stored)


DEMOS = {"demo": "demo", "demo-vision": "demo_vision"}  # model argument → folder beside this file


def resolve_checkpoint(model: str) -> Path:
    """The directory that a model argument names: a demo checkpoint's, or a local path. Raises BadInput."""
    if model in DEMOS:
        return Path(__file__).parent / DEMOS[model]
    path = Path(model)
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise BadInput(f"{model}: {kind}; give a Hugging Face checkpoint directory, 'demo' or 'demo-vision'")
    return path


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint directory ``path`` and check it against its own config.json.

    Reads no weights, except when a model with a tied head stores the head too: it must equal the embedding table.
    Raises BadInput when a file or shard is missing or damaged, when such a head differs, and when a tensor is missing,
    unexpected, stored twice, has another shape, or has another dtype than F32, BF16 and F16.
    """
    if not (path / CONFIG).exists() and (advice := _instead(path)):  # an adapter has no config.json
        raise BadInput(f"{path}: {advice}")
    if (path / ADAPTER).exists():
        raise BadInput(
            f"{path}: has {ADAPTER} beside the model, and transformers would apply that adapter; merge it "
            "(merge_and_unload) and save the result, or move the adapter's files away"
        )
    config = read_config(path / CONFIG)
    stored: dict[str, str] = {}
    owner: dict[str, Any] = {}
    paths: dict[str, Path] = {}
    for file_path in _weight_files(path):
        file = _open(file_path)
        for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
            plain = _plain_name(name)
            if plain.endswith(NOT_WEIGHTS):
                continue
            if plain in stored:
                raise BadInput(f"{path}: tensor {plain} is stored twice (as {stored[plain]} and {name})")
            stored[plain], owner[plain], paths[plain] = name, file, file_path
    expected = weight_shapes(config, has_head=names.HEAD in stored)
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing:
        raise BadInput(
            f"{path}: {_some(missing)} missing; config.json expects {len(expected)} tensors; "
            f"{_advice(config, missing, stored)}"
        )
    if extra:
        raise BadInput(
            f"{path}: {_some(extra)} not part of the model that config.json describes; does it belong to these weights?"
        )
    for name, shape in expected.items():
        piece = owner[name].get_slice(stored[name])
        if tuple(piece.get_shape()) != shape:
            raise BadInput(f"{path}: {name} has shape {piece.get_shape()}, config.json asks for {list(shape)}")
        if piece.get_dtype() not in ("F32", "BF16", "F16"):
            raise BadInput(f"{path}: {name} is {piece.get_dtype()}; only F32, BF16 and F16 weights can be read")
    if config.tie_word_embeddings and names.HEAD in stored:
        _check_stored_twin(path, owner, stored)
        del expected[names.HEAD]
    ordered = {name: stored[name] for name in expected}
    return Checkpoint(path, config, Companions(path, config), paths, ordered)


def load_model(checkpoint: Checkpoint) -> Gemma3:
    """The float32 eager model with the checkpoint's weights, in eval mode, without gradients."""
    return build_model(checkpoint.config, checkpoint.items())


def build_model(config: ModelConfig, named_weights: Iterable[tuple[str, Tensor]]) -> Gemma3:
    """The float32 eager model of ``config`` with exactly these weights, in eval mode, without gradients.

    Raises BadInput when a weight is missing, is not part of the model, or has another shape.
    """
    state = {name: tensor.float() for name, tensor in named_weights}
    check_shapes(config, {name: tuple(tensor.shape) for name, tensor in state.items()})
    return fill(empty_model(config), state)


def empty_model(config: ModelConfig) -> Gemma3:
    """The model on the meta device, without memory for its weights (see ``fill``), in eval mode, without gradients."""
    with torch.device("meta"):
        return Gemma3(config).eval().requires_grad_(False)


def fill(model: Gemma3, state: Mapping[str, Tensor]) -> Gemma3:
    """Put the weights ``state`` (by name) into an empty model, without copying them, and return it.

    A tied head gets the embedding table.
    """
    tied = model.config.tie_word_embeddings and names.EMBEDDING in state
    model.load_state_dict({**state, names.HEAD: state[names.EMBEDDING]} if tied else state, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False)


def check_shapes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises BadInput when a weight of ``config``'s model is missing, is not part of it, or has another shape."""
    expected = weight_shapes(config, has_head=names.HEAD in shapes)
    for name in sorted(expected.keys() ^ shapes.keys()):
        problem = "is missing" if name in expected else "is not part of the model"
        raise BadInput(f"weight {name} {problem} that config.json describes; they are not of one checkpoint")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise BadInput(f"weight {name} has shape {list(shapes[name])}, config.json asks for {list(shape)}")


def weight_shapes(config: ModelConfig, has_head: bool = True) -> dict[str, tuple[int, ...]]:
    """Name → shape of every weight. Without ``has_head``, a tied model's head is left out."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Gemma3(config).state_dict().items()}
    if config.tie_word_embeddings and not has_head:
        del shapes[names.HEAD]
    return shapes


def _check_stored_twin(path: Path, owner: dict[str, Any], stored: dict[str, str]) -> None:
    """A tied model may still store its head, which must then equal the embedding table."""
    head, table = (owner[name].get_tensor(stored[name]) for name in (names.HEAD, names.EMBEDDING))
    if not torch.equal(head, table):
        raise BadInput(
            f"{path}: {names.HEAD} differs from its embedding table though config.json ties them; "
            "set tie_word_embeddings to false"
        )


def _weight_files(path: Path) -> list[Path]:
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    if single.exists() or single.is_symlink():
        return [single]
    if not (index.exists() or index.is_symlink()):
        raise BadInput(f"{path}: {_instead(path) or f'holds neither {SINGLE_FILE} nor {INDEX_FILE}; {GIVE}'}")
    data = read_json(index, AGAIN)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(one, str) for one in weight_map.values())):
        raise BadInput(f"{index}: not a safetensors index: no weight_map from names to files; {AGAIN}")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or len(shard.encode(errors="replace")) > 255:
            raise BadInput(f"{index}: shard {ascii(shard)[:80]} is not a plain file name")
        if not (path / shard).exists():
            raise BadInput(f"{path}: shard {ascii(shard)[1:-1][:80]} of {len(shards)} is missing; {AGAIN}")
    return [path / shard for shard in shards]


def _instead(path: Path) -> str | None:
    return next((advice for name, advice in INSTEAD.items() if (path / name).is_file()), None)


def _open(file: Path) -> Any:
    check_plain(file, AGAIN)
    try:
        return safe_open(str(file), framework="pt")
    except OSError as error:
        raise BadInput(f"{file}: {reason(error)}") from None
    except SafetensorError as error:
        with file.open("rb") as opened:
            pointer = opened.read(len(GIT_LFS)) == GIT_LFS
        advice = "it is a git-lfs pointer; fetch the file itself with git lfs pull" if pointer else AGAIN
        raise BadInput(f"{file}: not a readable safetensors file ({error}); {advice}") from None


def _advice(config: ModelConfig, missing: list[str], stored: Iterable[str]) -> str:
    """What to do about missing tensors, judged by which they are and by the names that are there instead."""
    for marks, advice in WRAPPERS:
        if any(name.startswith(marks) or any(mark in name for mark in marks if mark[0] == ".") for name in stored):
            return f"the tensors have {advice}"
    if config.vision is not None and all(name.startswith((names.VISION_TOWER, names.PROJECTOR)) for name in missing):
        return "its vision model was removed; to use the text model alone, remove vision_config from config.json"
    return AGAIN


def _plain_name(name: str) -> str:
    name = name.replace(COMPILED, "")
    for prefix, plain in PREFIXES:
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def _some(tensors: list[str]) -> str:
    more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
    return f"tensor {', '.join(tensors[:3])}{more}"
