"""Write a checkpoint in the shape of a released Gemma 3, with random weights, for measurements at the real size.

    python -m scripts.random_checkpoint 270m DIRECTORY
    python -m scripts.random_checkpoint 4b DIRECTORY --layers 6 --vision-layers 2
    python -m scripts.random_checkpoint 12b DIRECTORY --text-only
    python -m scripts.random_checkpoint 270m DIRECTORY --as-trained 8

The files are those of Hugging Face: config.json as released, model.safetensors in bfloat16 (several files with an index
from 5 GB on), and a tokenizer.model with the real vocabulary size, Gemma's special ids and made-up words. The same
arguments give the same weights.
"""

import argparse
import copy
import itertools
import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2

from gemma3.config import parse_config
from gemma3.model import Gemma3
from gemma3.names import FINAL_NORM

# Generated code creates the module's classes when it is imported, so a type checker does not know them.
protobuf: Any = sentencepiece_model_pb2

COMMON: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 262144,
}


def multimodal(**text: int) -> dict[str, Any]:
    """The configuration of a multimodal model with these sizes of its text model."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            **text,
            "model_type": "gemma3_text",
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


SHAPES = {
    "270m": COMMON | {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
    "1b": COMMON | {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
    "4b": multimodal(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
    "12b": multimodal(
        hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=8
    ),
    "27b": multimodal(
        hidden_size=5376,
        intermediate_size=21504,
        num_hidden_layers=62,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=168,
    ),
}


def text_only(shape: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a multimodal model's text model alone, as a checkpoint of its own has it."""
    whole = {name: shape[name] for name in ("eos_token_id", "initializer_range", "torch_dtype")}
    return {"architectures": COMMON["architectures"], **whole, **shape["text_config"]}


PIECES = 262_144  # of the released vocabulary; a multimodal model's image token comes after them
IMAGE_PIECES = {255_999: "<start_of_image>", 256_000: "<end_of_image>"}


SHARD_BYTES = 5_000_000_000
DRAWN_AT_ONCE = 1 << 29  # values of a table that are in float32 together


def random_weights(config: dict[str, Any], seed: int, prefixes: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
    """bfloat16 weights whose names begin with one of ``prefixes``. See ``weights_in_order``."""
    return dict(weights_in_order(config, seed, prefixes))


def weights_in_order(
    config: dict[str, Any], seed: int, prefixes: tuple[str, ...] = ("",)
) -> Iterator[tuple[str, torch.Tensor]]:
    """bfloat16 weights by name, made one after another.

    Their size keeps the variance of activations in every matrix product; the standard deviation of logits is about 1.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Gemma3(parse_config(config)).state_dict().items()}
    del shapes["lm_head.weight"]  # tied
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        if not name.startswith(prefixes):
            continue
        deviation = 0.1 if "norm" in name or name.endswith("bias") else shape[1:].numel() ** -0.5
        # An RMSNorm's weight is an offset from 1, a LayerNorm's is not.
        mean = 1.0 if name.startswith("vision_tower") and "norm" in name and name.endswith("weight") else 0.0
        weight = torch.empty(shape, dtype=torch.bfloat16)
        rows = max(1, DRAWN_AT_ONCE // shape[1:].numel())
        for start in range(0, len(weight), rows):
            part = weight[start : start + rows]
            part.copy_(torch.empty(part.shape).normal_(mean, deviation, generator=generator))
        yield name, weight


def save_weights(
    weights: Iterable[tuple[str, torch.Tensor]],
    directory: Path,
    rename: Callable[[str], str] = str,
    change: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> None:
    """Write ``weights`` under new names as model.safetensors, or as files of about SHARD_BYTES with an index.

    Only one file's weights are in memory. Vectors come last; ``change`` may change them in place.
    """
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    vectors: dict[str, torch.Tensor] = {}

    def save() -> None:
        shards.append(list(held))
        save_file(held, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
        held.clear()

    for name, weight in weights:
        if weight.dim() == 1:
            vectors[name] = weight
            continue
        if held and sum(one.nbytes for one in held.values()) + weight.nbytes > SHARD_BYTES:
            save()
        held[rename(name)] = weight
    if change is not None:
        change(vectors)
    held |= {rename(name): weight for name, weight in vectors.items()}
    save()
    if len(shards) == 1:
        (directory / "shard-1").rename(directory / "model.safetensors")
        return
    files = [f"model-{index:05}-of-{len(shards):05}.safetensors" for index in range(1, len(shards) + 1)]
    for index, file in enumerate(files, 1):
        (directory / f"shard-{index}").rename(directory / file)
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    content = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1)
    (directory / "model.safetensors.index.json").write_text(content + "\n")


def as_trained(weights: dict[str, torch.Tensor], deviation: float, seed: int = 0) -> None:
    """Give ``weights``, in place, norms as large as those of a trained Gemma, and logits of this standard deviation.

    The norms before attention and MLP multiply by 3 to 11, those after them by 0.5 to 4.5. Random weights with a tied
    table, as ``random_weights`` makes them, have logits as large as the final norm's factors.
    """
    generator = torch.Generator().manual_seed(seed)
    ranges = {"input_layernorm": (2, 10), "pre_feedforward": (2, 10), "post_": (-0.5, 3.5)}
    for name, weight in weights.items():
        for part, (low, high) in ranges.items():
            if part in name and not name.startswith("vision_tower"):
                weight.uniform_(low, high, generator=generator)
    final = weights[FINAL_NORM]
    final.copy_(deviation * torch.empty(final.shape).uniform_(0.8, 1.2, generator=generator) - 1)


def as_released(name: str) -> str:
    """A weight's name in the released files of multimodal models."""
    return f"language_model.{name}" if name.startswith("model.") else name


def made_up_tokenizer(vocab_size: int, special: Mapping[int, str] | None = None) -> bytes:
    """A SentencePiece model (BPE): Gemma's special ids and bytes in their places, then characters and short words.

    The words are all combinations of lower-case letters, in order. ``special`` puts other pieces at ids among them.
    """
    model = protobuf.ModelProto()
    kind = protobuf.ModelProto.SentencePiece
    letters = string.ascii_lowercase

    def add(piece: str, piece_type: int = kind.NORMAL) -> None:
        model.pieces.add(piece=piece, type=piece_type, score=-float(len(model.pieces)))

    for control in ("<pad>", "<eos>", "<bos>"):
        add(control, kind.CONTROL)
    add("<unk>", kind.UNKNOWN)
    add("<mask>", kind.USER_DEFINED)
    for index in range(100):
        add(f"<unused{index}>", kind.USER_DEFINED)
    add("<start_of_turn>", kind.USER_DEFINED)  # 105
    add("<end_of_turn>", kind.USER_DEFINED)
    for count in range(1, 32):
        add("\n" * count, kind.USER_DEFINED)
    while len(model.pieces) < 238:
        add(f"<unused{len(model.pieces)}>", kind.USER_DEFINED)
    for byte in range(256):
        add(f"<0x{byte:02X}>", kind.BYTE)
    add("▁")
    for character in string.digits + string.ascii_letters + string.punctuation:
        add(character)
    words = ("".join(word) for length in itertools.count(2) for word in itertools.product(letters, repeat=length))
    while len(model.pieces) < vocab_size:
        piece = (special or {}).get(len(model.pieces))
        if piece is None:
            add(next(words))
        else:
            add(piece, kind.USER_DEFINED)

    model.trainer_spec.model_type = protobuf.TrainerSpec.BPE
    model.trainer_spec.vocab_size = vocab_size
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.split_digits = True
    for name, token in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        setattr(model.trainer_spec, f"{name}_id", token)
        setattr(model.trainer_spec, f"{name}_piece", f"<{name}>")
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return bytes(model.SerializeToString())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, help="text layers, instead of the released number")
    parser.add_argument("--vision-layers", type=int, help="layers of the vision model, instead of the released number")
    parser.add_argument("--text-only", action="store_true", help="the text model of a multimodal shape, by itself")
    parser.add_argument("--as-trained", type=float, metavar="DEVIATION", help="trained-looking norms, and logits")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = copy.deepcopy(SHAPES[arguments.shape])
    if arguments.text_only and "vision_config" in config:
        config = text_only(config)
    multimodal = "vision_config" in config
    if arguments.layers is not None:
        config.get("text_config", config)["num_hidden_layers"] = arguments.layers
    if arguments.vision_layers is not None:
        if not multimodal:
            parser.error("a text-only model has no vision model; leave out --vision-layers")
        config["vision_config"]["num_hidden_layers"] = arguments.vision_layers
    arguments.directory.mkdir(parents=True)
    weights = weights_in_order(config, arguments.seed)
    deviation, trained = arguments.as_trained, None
    if deviation is not None:
        trained = partial(as_trained, deviation=deviation, seed=arguments.seed)
    save_weights(weights, arguments.directory, as_released if multimodal else str, trained)
    if multimodal:
        added = json.dumps({"<image_soft_token>": config["image_token_index"]})
        (arguments.directory / "added_tokens.json").write_text(added + "\n")
    (arguments.directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = made_up_tokenizer(PIECES, IMAGE_PIECES if multimodal else None)
    (arguments.directory / "tokenizer.model").write_bytes(tokenizer)


if __name__ == "__main__":
    main()
