"""config.json, generation_config.json and the image processor's files, as each version of transformers writes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.kinds.kind import Kind
from tests.kinds.weights import IMAGE_SIZE, TOKENS_PER_IMAGE

SLIDING, FULL = "sliding_attention", "full_attention"

# Keys that tools write into config.json and that no version of transformers reads for this architecture.
MARKS: dict[str, dict[str, Any]] = {
    "none": {},
    "tools'": {
        "unsloth_fixed": True,
        "unsloth_version": "2025.9.1",
        "auto_map": {"AutoModelForCausalLM": "modeling_gemma3.Gemma3ForCausalLM"},
        "num_labels": 2,
        "id2label": {"0": "no", "1": "yes"},
        "label2id": {"no": 0, "yes": 1},
    },
    "generation keys": {
        "max_length": 20,
        "do_sample": False,
        "top_k": 50,
        "temperature": 1.0,
        "repetition_penalty": 1.0,
        "is_decoder": False,
        "pretraining_tp": 1,
        "tokenizer_class": "GemmaTokenizer",
        "torchscript": False,
        "pruned_heads": {},
    },
}
WRONG: dict[str, dict[str, Any]] = {
    "quantized by bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "soft capping": {"final_logit_softcapping": 30.0},
    "attends to both sides": {"use_bidirectional_attention": True},
    "another architecture": {"model_type": "gemma2"},
}
# What TRL's setup_chat_format makes of the model's token ids: those of its two markers.
ROLES = {"bos_token_id": 4096, "eos_token_id": 4097, "pad_token_id": 4097}
# The text model's defaults in 4.50, which the released multimodal files leave out.
LEFT_OUT = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "use_cache": True,
}


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply ``change`` to the JSON object at ``path``, in place."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2))


def respell(kind: Kind, directory: Path) -> None:
    """Rewrite the config.json that transformers 5 saved in ``directory`` in the spelling of ``kind``."""
    edit(directory / "config.json", lambda config: _respell(config, kind))


def _respell(config: dict[str, Any], kind: Kind) -> None:
    outer, text = config, config.get("text_config", config)
    if kind.model == "blind":
        del outer["vision_config"]
    if kind.config in ("4.57", "4.50"):
        _as_version_4(outer, text, old=kind.config == "4.50")
    elif kind.config == "merged":  # each value in one of the two spellings, all of which transformers 5 reads
        full, local = text["rope_parameters"][FULL], text["rope_parameters"].pop(SLIDING)
        text |= {"rope_theta": full.pop("rope_theta"), "rope_local_base_freq": local["rope_theta"]}
        if "factor" in full:
            text["rope_scaling"] = {key: full.pop(key) for key in ("rope_type", "factor")}
            full["rope_type"] = "default"
        text["sliding_window_pattern"] = 2  # layer_types decide
        del text["_sliding_window_pattern"]
    if kind.head == "untied inside":
        outer.pop("tie_word_embeddings", None)
    if kind.fault == "roles of TRL":
        outer |= ROLES
    levels = [outer]
    if kind.marks == "generation keys":  # 4.x nested whole configurations
        levels += [level for level in (outer.get("text_config"), outer.get("vision_config")) if level is not None]
    for level in levels:
        level |= MARKS[kind.marks]
    if kind.fault == "YaRN":
        yarn = {"rope_type": "yarn", "factor": 4.0}
        if "rope_parameters" in text:
            text["rope_parameters"][FULL] |= yarn
        else:
            text["rope_scaling"] = yarn
    elif kind.fault in WRONG:
        (text if kind.fault in ("soft capping", "attends to both sides") else outer).update(WRONG[kind.fault])


def _as_version_4(outer: dict[str, Any], text: dict[str, Any], old: bool) -> None:
    """``old`` is the spelling of the released files, the other that of the last 4.x."""
    ropes = text.pop("rope_parameters")
    scaled = ropes[FULL]["rope_type"] != "default"
    text["rope_theta"], text["rope_local_base_freq"] = ropes[FULL]["rope_theta"], ropes[SLIDING]["rope_theta"]
    text["rope_scaling"] = {key: ropes[FULL][key] for key in ("factor", "rope_type")} if scaled else None
    outer["transformers_version"] = "4.50.0.dev0" if old else "4.57.1"
    del text["_sliding_window_pattern"]
    if not old:
        text["_sliding_window_pattern"] = 3
        text["dtype"] = outer["dtype"]
        return
    outer["torch_dtype"] = outer.pop("dtype")
    del text["layer_types"], text["use_bidirectional_attention"]
    text["sliding_window_pattern"] = 3
    if text["tie_word_embeddings"]:
        del text["tie_word_embeddings"]
        outer.pop("tie_word_embeddings", None)
    if text is outer:
        text["cache_implementation"] = "hybrid"
    else:
        outer["eos_token_id"] = text.pop("eos_token_id")
        for key, value in LEFT_OUT.items():
            if text[key] == value:
                del text[key]


def write_generation(kind: Kind, directory: Path, stop: int) -> None:
    """Rewrite the generation_config.json in ``directory``. ``stop`` is the id that only this file may name."""
    path = directory / "generation_config.json"
    if kind.fault == "roles of TRL":
        edit(path, lambda config: config.update(ROLES))
    if kind.generation == "absent":
        path.unlink()
    elif kind.generation == "more stops":
        edit(path, lambda config: config.update(eos_token_id=[1, 6, stop]))
    elif kind.generation == "sampling":  # as released, with one stop id
        released = {
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "do_sample": True,
            "eos_token_id": 6,
            "pad_token_id": 0,
            "top_k": 64,
            "top_p": 0.95,
            "transformers_version": "4.50.0.dev0",
        }
        path.write_text(json.dumps(released, indent=2))


def write_processor(kind: Kind, directory: Path) -> None:
    """The files beside a multimodal checkpoint that describe its images."""
    image_processor = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pan_and_scan": None,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": TOKENS_PER_IMAGE,
        "image_std": [0.5, 0.5, 0.5],
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }
    processor: dict[str, Any] = {"image_seq_length": TOKENS_PER_IMAGE, "processor_class": "Gemma3Processor"}
    if kind.fault == "pictures of another mean":
        image_processor["image_mean"] = [0.48, 0.46, 0.41]
    elif kind.fault == "pictures of another size":
        image_processor["size"] = {"height": 2 * IMAGE_SIZE, "width": 2 * IMAGE_SIZE}
    if kind.processor == "4":
        old = image_processor | {"processor_class": "Gemma3Processor"}
        (directory / "preprocessor_config.json").write_text(json.dumps(old, indent=2))
    elif kind.processor == "5":
        processor["image_processor"] = image_processor | {"data_format": "channels_first"}
    if kind.processor != "none":
        (directory / "processor_config.json").write_text(json.dumps(processor, indent=2))
