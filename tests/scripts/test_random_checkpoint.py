from dataclasses import replace

import pytest

from gemma3.config import parse_config
from scripts.random_checkpoint import SHAPES, text_only


@pytest.mark.parametrize("shape", ["4b", "12b", "27b"])
def test_the_text_model_alone_differs_from_the_whole_one_in_vision_only(shape: str) -> None:
    whole = parse_config(SHAPES[shape])
    assert whole.vision is not None
    assert parse_config(text_only(SHAPES[shape])) == replace(whole, vision=None)
