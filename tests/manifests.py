"""Manifests of bundles that do not exist."""

from export.manifest import SCHEMA_VERSION, Artifact, Manifest, TokenizerInfo
from gemma3.cache import CacheStyle, cache_layout
from gemma3.config import ModelConfig
from quant.recipe import Verdict

CONTEXT, CHUNK = 96, 8


def manifest_of(config: ModelConfig, context: int = CONTEXT, chunk: int = CHUNK, scheme: str = "float32") -> Manifest:
    def artifact(style: CacheStyle) -> Artifact:
        layout = cache_layout(config, style, context, chunk)
        return Artifact("model", ("model",), layout, (), ("float",), (), {}, {}, 1, 1, 1, {}, {})

    return Manifest(
        schema_version=SCHEMA_VERSION,
        gemma_edge="0",
        model=config,
        recipe="",
        rules={},
        method="rtn",
        weights={"a": Verdict(scheme, "why")},
        context=context,
        chunk=chunk,
        reference_dtype="float32",
        tokenizer=TokenizerInfo("", 2, (1,), 0, "{{ template }}", {}),
        artifacts={"pte": artifact("ring"), "onnx": artifact("compacting")},
        files={},
        validation=(),
    )


def seeing_manifest(config: ModelConfig) -> Manifest:
    assert config.vision is not None
    return manifest_of(config, context=128, chunk=max(CHUNK, config.vision.tokens_per_image))
