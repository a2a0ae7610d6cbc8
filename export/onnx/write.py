"""Write the ONNX graphs of a model, and the configuration with which onnxruntime-genai runs them as they are."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from export.onnx.file import VISION_FILE, data_file
from export.onnx.layers import INT8_LEVEL, IR_VERSION, OPSETS, write_graph
from export.onnx.text import text_model
from export.onnx.vision import vision_model
from export.target import FORWARD, VISION_ENCODER, ExportReport, Method
from gemma3.cache import CacheLayout
from gemma3.config import ModelConfig
from gemma3.errors import BadInput
from gemma3.model import RoundHeads
from quant.weights import Weights

GENAI_CONFIG = "genai_config.json"


def export(
    config: ModelConfig,
    weights: Weights,
    layout: CacheLayout,
    eos_ids: Sequence[int],
    path: Path,
    float_activations: Collection[str],
    kv: Mapping[int, RoundHeads],
) -> ExportReport:
    """The target's exporter (see ``export.target.Export``): ``export_onnx``, and genai_config.json beside the graph."""
    report = export_onnx(config, weights, layout, path, float_activations, kv)
    genai = json.dumps(genai_config(config, layout, eos_ids, path.name), indent=1)
    path.with_name(GENAI_CONFIG).write_text(genai + "\n", encoding="utf-8")
    return report


def export_onnx(
    config: ModelConfig,
    weights: Weights,
    layout: CacheLayout,
    path: Path,
    float_activations: Collection[str] = (),
    kv: Mapping[int, RoundHeads] | None = None,
) -> ExportReport:
    """Write the graph ``path`` and its weights ``path``.data; for a multimodal model also the vision model's graph.

    ``weights`` are by checkpoint name: float tensors (written as float32), IntegerWeight of 4 or 8 bits, or Sfp8Weight.
    SFP8 codes go into the file as they are and are decoded when it is loaded (4 bytes per weight in memory). This is
    for validation; export/stand_ins.py makes the integers that ship. ``layout`` must be of the compacting style. ``kv``
    has the scales (``PerChannel``) of every layer if the layout's dtype is int8. MatMulNBits rounds the inputs of
    integer weights to int8 by block, but not those of ``float_activations``. Raises BadInput for weights that do not
    fit the configuration or the runtime's kernels. The same arguments give the same bytes.
    """
    assert layout.style == "compacting"
    for spec in config.layers:
        if spec.head_dim % 8:
            raise BadInput(f"head_dim is {spec.head_dim}; ONNX Runtime's attention needs a multiple of 8")
    inputs, outputs, used = write_graph(
        path, "gemma3", weights, float_activations, lambda graph: text_model(graph, config, layout, kv or {})
    )
    methods = [Method(FORWARD, path.name, inputs, outputs)]
    if config.vision is not None:
        inputs, outputs, used_for_images = write_graph(
            path.with_name(VISION_FILE),
            "gemma3-vision",
            weights,
            float_activations,
            lambda graph: vision_model(graph, config),
        )
        methods.append(Method(VISION_ENCODER, VISION_FILE, inputs, outputs))
        used |= used_for_images
    unused = sorted(set(weights) - used)
    if unused:
        raise BadInput(f"{len(unused)} weights are not part of this model, the first is {unused[0]}")
    files = tuple(
        file.name
        for graph in dict.fromkeys(method.file for method in methods)
        for file in (path.with_name(graph), data_file(path.with_name(graph)))
    )
    details = {"ir_version": IR_VERSION, "accuracy_level": INT8_LEVEL}
    return ExportReport(tuple(methods), files, dict(OPSETS), details)


def genai_config(
    config: ModelConfig, layout: CacheLayout, eos_ids: Sequence[int], filename: str = "model.onnx"
) -> dict[str, Any]:
    """The content of genai_config.json, which onnxruntime-genai reads together with the tokenizer's JSON files.

    A user must not change its max_length from the context, because the graph fixes the shapes of the caches.
    """
    local = [index for index, spec in enumerate(config.layers) if spec.window is not None]
    slots = layout.layers[local[0]].slots if local else 0
    window = min(config.sliding_window, slots)
    sliding = {
        "window_size": window,
        "layers": local,
        "slide_key_value_cache": False,
        "slide_inputs": False,
        "cache_slack": slots - window,
    }
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_hidden_layers": config.num_layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        **({"sliding_window": sliding} if local else {}),
    }
    return {
        "model": {
            "type": "gemma3_text",
            "bos_token_id": config.bos_token_id,
            "eos_token_id": list(eos_ids),
            "pad_token_id": config.pad_token_id,
            "vocab_size": config.vocab_size,
            "context_length": layout.context,
            "decoder": decoder,
        },
        "search": {"do_sample": False, "max_length": layout.context, "past_present_share_buffer": True},
    }
