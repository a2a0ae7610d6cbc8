"""Write a checkpoint of a released Gemma 3 shape with random weights, for measurements at the true size.

    python scripts/random_checkpoint.py 270m DIRECTORY

Hugging Face layout: config.json as released, model.safetensors in bfloat16, and a tokenizer.model with the
vocabulary's true size and Gemma's special ids, whose text pieces are made up. The same arguments give the same
weights.
"""

import argparse
import itertools
import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2 as sentencepiece  # type: ignore[attr-defined]

from gemma3.config import parse_config
from gemma3.model import Gemma3

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
SHAPES = {
    "270m": COMMON | {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
    "1b": COMMON | {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
}


def random_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """bfloat16, of a size that keeps every product's variance; the logits' deviation is about 1."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Gemma3(parse_config(config)).state_dict().items()}
    del shapes["lm_head.weight"]  # tied
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        deviation = 0.1 if "norm" in name else shape[-1] ** -0.5
        weights[name] = torch.empty(shape).normal_(0.0, deviation, generator=generator).to(torch.bfloat16)
    return weights


def made_up_tokenizer(vocab_size: int) -> bytes:
    """A BPE SentencePiece model: Gemma's special ids and bytes in their places, then every short lower-case word."""
    model = sentencepiece.ModelProto()
    kind = sentencepiece.ModelProto.SentencePiece
    letters = string.ascii_lowercase

    def add(piece: str, piece_type: int = kind.NORMAL) -> None:
        model.pieces.add(piece=piece, type=piece_type, score=-float(len(model.pieces)))

    for special in ("<pad>", "<eos>", "<bos>"):
        add(special, kind.CONTROL)
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
    for word in itertools.islice(words, vocab_size - len(model.pieces)):
        add(word)

    model.trainer_spec.model_type = sentencepiece.TrainerSpec.BPE
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
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = SHAPES[arguments.shape]
    arguments.directory.mkdir(parents=True)
    weights = random_weights(config, arguments.seed)
    save_file(weights, arguments.directory / "model.safetensors", metadata={"format": "pt"})
    (arguments.directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (arguments.directory / "tokenizer.model").write_bytes(made_up_tokenizer(config["vocab_size"]))


if __name__ == "__main__":
    main()
