"""The models of the kinds, with random weights, and the files of their tensors."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

from tests.kinds.kind import Kind

ROWS = 4096  # of the demo's tokenizer
PADDED_ROWS = 4160  # a table resized for added tokens, to a multiple of 64
ADDING = ("an added word that takes a space", "roles of TRL")  # faults with added tokens
POSITIONS, WINDOW = 128, 16
THETA, LOCAL_THETA, FACTOR = 50_000.0, 2_000.0, 4.0  # none is a default, so that a lost one is seen
IMAGE_SIZE, TOKENS_PER_IMAGE = 28, 4
IMAGE_TOKENS: dict[str, Any] = {"boi_token_index": 7, "eoi_token_index": 8, "image_token_index": 9}  # the demo's
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "mixed": torch.bfloat16}


def build(kind: Kind) -> Any:
    """transformers' float32 model of ``kind``, its weights rounded to the stored dtype.

    Its logits have a deviation of about 1.
    """
    full = {"rope_type": "default", "rope_theta": THETA}
    if kind.rope == "linear":
        full |= {"rope_type": "linear", "factor": FACTOR}
    text: dict[str, Any] = {
        "vocab_size": PADDED_ROWS if kind.added in ("words", "markers") or kind.fault in ADDING else ROWS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 40,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": WINDOW if kind.window == "short" else 2 * POSITIONS,
        "max_position_embeddings": POSITIONS,
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL_THETA},
        },
        "tie_word_embeddings": not kind.head.startswith("untied"),
        "eos_token_id": [1, 6],
    }
    torch.manual_seed(0)
    if kind.model == "text":
        model: Any = Gemma3ForCausalLM(Gemma3TextConfig(**text))
    else:
        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": 7,
            "vision_use_head": False,
        }
        config = Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=TOKENS_PER_IMAGE,
            tie_word_embeddings=not kind.head.startswith("untied"),
            **IMAGE_TOKENS,
        )
        model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.2 if weight.dim() == 1 else weight[0].numel() ** -0.5)
            if "vision_tower" in name and "norm" in name and name.endswith("weight"):
                weight.add_(1.0)  # a LayerNorm's weight, which is not an offset from 1
            weight.copy_(weight.to(DTYPES[kind.dtype]))
    return model.eval()


def rewrite(kind: Kind, directory: Path) -> None:
    """Rewrite the tensors that transformers saved in ``directory`` as the tool of ``kind`` does."""
    stored = {name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}
    (directory / "model.safetensors").unlink()
    table = next(name for name in stored if name.endswith("embed_tokens.weight"))
    head = "lm_head.weight" if kind.model == "text" else "language_model.lm_head.weight"
    if kind.head == "tied and stored":
        stored[head] = stored[table].clone()
    if kind.dtype == "mixed":
        stored = {name: tensor.float() if "norm" in name else tensor for name, tensor in stored.items()}
    if kind.model == "blind":
        stored = {name: tensor for name, tensor in stored.items() if name.startswith("language_model.")}
    stored = {_renamed(name, kind): tensor for name, tensor in stored.items()}
    _spoil(stored, kind.fault)
    if kind.fault == "pickled weights":
        torch.save(stored, directory / "pytorch_model.bin")
    elif kind.fault == "an adapter alone":
        (directory / "config.json").unlink()
        (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
        save_file({"base_model.model.model.norm.weight": torch.zeros(64)}, directory / "adapter_model.safetensors")
    elif kind.files == "shards" or kind.fault == "a shard missing":
        save_torch_state_dict(stored, directory, max_shard_size="300KB", metadata={"format": "pt"})
        assert (directory / INDEX).exists()
        if kind.fault == "a shard missing":
            next(directory.glob("model-00002-of-*")).unlink()
    elif kind.files == "one shard":
        name = "model-00001-of-00001.safetensors"
        save_file(stored, directory / name, {"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(stored, name)}
        (directory / INDEX).write_text(json.dumps(index))
    else:
        save_file(stored, directory / "model.safetensors", {"format": "pt"})


def _renamed(name: str, kind: Kind) -> str:
    """The stored name of a tensor that transformers 5 saves as ``name``."""
    if kind.config in ("4.57", "4.50"):
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
    if kind.names == "in memory":  # since 4.52
        if name.startswith("language_model.lm_head."):
            return name.removeprefix("language_model.")
        return "model." + name.replace("language_model.model.", "language_model.")
    if kind.names == "without model":  # of the class without a head
        return name.removeprefix("model.").replace("language_model.model.", "language_model.")
    if kind.names == "compiled":  # a state_dict of torch.compile's module, which transformers does not read
        return f"_orig_mod.{name}"
    return name


def _spoil(stored: dict[str, torch.Tensor], fault: str) -> None:
    """Make the tensors wrong in the way that ``fault`` names."""
    of_layer = {name.rpartition("layers.")[2]: name for name in stored if "layers." in name and "vision" not in name}
    prefixes = {"names of PEFT": "base_model.model.", "names of DataParallel": "module."}
    if fault == "another head under a tie":
        name = next(name for name in stored if name.endswith("embed_tokens.weight"))
        stored[name.replace("model.embed_tokens", "lm_head")] = stored[name] + 0.1
    elif fault in prefixes:
        for name in list(stored):
            stored[prefixes[fault] + name] = stored.pop(name)
    elif fault == "a tensor missing":
        del stored[of_layer["1.mlp.up_proj.weight"]]
    elif fault == "a head of classes":
        stored["score.weight"] = torch.zeros(2, 64)
    elif fault == "8-bit integers":
        name = of_layer["0.mlp.up_proj.weight"]
        stored[name] = stored[name].to(torch.int8)
