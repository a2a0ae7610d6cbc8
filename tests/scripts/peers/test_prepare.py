"""What the converters get."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from scripts.peers.prepare import with_flat_rope
from tests.shapes import SHAPES


@pytest.mark.parametrize("shape", ["like-270m", "like-1b"])
def test_transformers_makes_the_same_rope_of_the_builders_config(tmp_path: Path, shape: str) -> None:
    rotations = []
    for config in (SHAPES[shape], with_flat_rope(SHAPES[shape])):
        (tmp_path / "config.json").write_text(json.dumps(config))
        rotations.append(dict(Gemma3RotaryEmbedding(AutoConfig.from_pretrained(tmp_path)).named_buffers()))
    plain, flat = rotations
    assert plain.keys() == flat.keys()
    assert not torch.equal(plain["full_attention_inv_freq"], plain["sliding_attention_inv_freq"])
    assert all(torch.equal(plain[name], flat[name]) for name in plain)
