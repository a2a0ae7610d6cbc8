"""The .pte of a multimodal model: its three methods compared with the eager network, wherever images are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.exir.schema import DelegateCall

from export.executorch.file import PteFile, xnnpack_graph
from export.executorch.lower import export_pte
from export.executorch.vision import VisionEncoder
from gemma3.cache import cache_layout
from gemma3.config import FULL, SLIDING, ModelConfig
from gemma3.errors import BadInput
from quant.integers import round_to_nearest
from runtime_py.proof.golden import relative_rms
from runtime_py.sessions.pte import PteSession
from tests.pte_models import CHUNK, TinyPte, tiny_pte
from tests.rewinding import assert_guesses_after_an_image_are_checked_as_by_single_steps
from tests.seeing import TOLERANCE, assert_steps_equal, network_inputs, random_images
from tests.shapes import VISION_SHAPES, random_model, random_pixels, tiny_vision_config, with_images

# Here rings hold 16 or 24 positions, windows 5 or 8, and calls at most 8, 9 or 16.
PIECES: list[list[int | None]] = [
    [None, 3],
    [None, None, None, 40],
    [5, None, 20, None, 3],
    [3, None, 2, None, 7, None, None, 12],
    [70, None, 1, None, 8],
    *([text, None, 20] for text in range(2, 24, 3)),
]


def few_layers(shape: str) -> ModelConfig:
    """Three layers: every layer costs seconds here, and these are of both kinds."""
    return replace(tiny_vision_config(shape), layer_types=(SLIDING, FULL, SLIDING))


def assert_equals_eager(tiny: TinyPte, pieces: list[int | None], chunk: int) -> None:
    """After every call: up to ``chunk`` ids, or an image."""
    ids, images = with_images(tiny.config, pieces), random_images(tiny.config, pieces.count(None))
    expected = tiny.eager_logits(ids, images)
    session = tiny.session()
    assert_steps_equal(session, ids, images, expected, chunk)
    whole = tiny.session().prefill(ids, images)
    assert np.abs(whole - expected[-1].numpy()).max() <= TOLERANCE
    if chunk == tiny.layout.chunk:  # the same calls
        assert np.array_equal(whole, session.logits)


@pytest.fixture(scope="module", params=VISION_SHAPES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyPte:
    return tiny_pte(few_layers(request.param), tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> TinyPte:
    return tiny_pte(few_layers("like-4b"), tmp_path_factory.mktemp("integers"), "int4-block32", "int8")


@pytest.mark.slow
@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize("chunk", [1, CHUNK])
def test_fp32_equals_eager(tiny: TinyPte, pieces: list[int | None], chunk: int) -> None:
    assert_equals_eager(tiny, pieces, chunk)


@pytest.mark.slow
def test_images_attend_both_ways(tiny: TinyPte) -> None:
    """Flagged as text, the same soft tokens give other logits, so the tests above would notice causal attention."""
    ids, images = with_images(tiny.config, [3, None]), random_images(tiny.config, 1)
    whole = tiny.session().prefill(ids, images)
    session = tiny.session()
    soft_tokens = torch.from_numpy(session.encode_image(images[0]))
    session.prefill(ids[:4])
    session._decoder.call((torch.nn.functional.pad(soft_tokens, (0, 1))[None], torch.tensor([4])))
    session.position += len(soft_tokens)
    assert np.abs(session.prefill(ids[-1:]) - whole).max() > 100 * TOLERANCE


@pytest.mark.parametrize("shape", VISION_SHAPES)
@torch.no_grad()
def test_the_vision_model_before_it_is_lowered(shape: str) -> None:
    config = tiny_vision_config(shape)
    model, pixels = random_model(config), random_pixels(config, 1)
    expected, found = model.encode_images(pixels), VisionEncoder(config, model.state_dict()).eval()(pixels)
    assert (found[..., :-1] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found[..., -1] == 1).all()


@pytest.mark.slow
def test_guesses_after_an_image_are_checked_as_by_single_steps(tiny: TinyPte) -> None:
    ids, images = with_images(tiny.config, [3, None, 20]), random_images(tiny.config, 1)
    assert_guesses_after_an_image_are_checked_as_by_single_steps(tiny.session(), tiny.session(), ids, images)


@pytest.mark.slow
def test_soft_tokens_equal_eager(tiny: TinyPte, integers: TinyPte) -> None:
    """With integers as with floats: few activations are rounded the other way."""
    for file in (tiny, integers):
        images = random_images(file.config, 3)
        with torch.no_grad():
            expected = file.eager().encode_images(network_inputs(images)).numpy()
        found = np.stack([file.session().encode_image(image) for image in images])
        difference = np.abs(found - expected).max(axis=-1) / np.abs(expected).max()
        assert (difference.max() if file is tiny else np.median(difference)) <= 1e-5


def vision_calls(path: Path) -> list[int]:
    """The delegates that encoding an image calls, by number, in order."""
    (chain,) = PteFile(path).plan("vision_encoder").chains
    arguments = [step.instr_args for step in chain.instructions]
    return [call.delegate_index for call in arguments if isinstance(call, DelegateCall)]


@pytest.mark.slow
def test_what_stays_outside_xnnpack(tiny: TinyPte) -> None:
    """Of the vision model, the flag that is appended to the result."""
    plan = PteFile(tiny.path).plan("vision_encoder")
    assert {operator.name for operator in plan.operators} == {"aten::constant_pad_nd"}
    assert len(plan.delegates) == 1
    assert vision_calls(tiny.path) == [0]


@pytest.mark.slow
def test_attention_scores_are_never_whole(tmp_path: Path) -> None:
    """Of 1024 patches, 256 at a time attend to all. XNNPACK goes block by block, and holds one block of scores."""
    config = few_layers("like-4b")
    assert config.vision is not None
    config = replace(config, vision=replace(config.vision, image_size=32 * 7, num_hidden_layers=1))
    tiny = tiny_pte(config, tmp_path)
    images = random_images(config, 1)
    expected = tiny.eager().encode_images(network_inputs(images)).detach().numpy()[0]
    assert np.abs(tiny.session().encode_image(images[0]) - expected).max() <= 1e-5 * np.abs(expected).max()
    file = PteFile(tiny.path)
    plan = file.plan("vision_encoder")
    assert sum(plan.non_const_buffer_sizes) < 1e6 < 2 * 1024**2 * 4  # without XNNPACK's own memory
    assert vision_calls(tiny.path) == [0, 1]
    graph = xnnpack_graph(file.segment(plan.delegates[0].processed.index))
    kinds = [node["xnode_union_type"].removeprefix("XNN") for node in graph["xnodes"]]
    block = ["BatchMatrixMultiply", "Softmax", "BatchMatrixMultiply"]
    assert [kind for kind in kinds if kind in block] == 4 * block


@pytest.mark.slow
@pytest.mark.parametrize("linears", ["fp32", "int8"])
def test_many_patches_go_through_one_delegate(linears: str, tmp_path: Path) -> None:
    """2304 patches in three equal parts: the MLP's weights are packed once and called three times."""
    config = few_layers("like-4b")
    assert config.vision is not None
    config = replace(config, vision=replace(config.vision, image_size=48 * 7, num_hidden_layers=3))
    tiny = tiny_pte(config, tmp_path) if linears == "fp32" else tiny_pte(config, tmp_path, "int4-block32", "int8")
    images = random_images(config, 1)
    with torch.no_grad():
        expected = tiny.eager().encode_images(network_inputs(images)).numpy()[0]
    error = relative_rms(tiny.session().encode_image(images[0]), expected)
    # With integers, an activation that is rounded the other way reaches every patch in the layers after it.
    assert error <= (1e-5 if linears == "fp32" else 2e-3)
    calls = vision_calls(tiny.path)
    # In each layer attention, its output projection, three parts of the MLP; at the end the norm and the projector.
    assert len(calls) == 3 * (1 + 1 + 3) + 1
    assert len(set(calls)) == len(PteFile(tiny.path).plan("vision_encoder").delegates) == 3 * 3 + 1
    if linears == "int8":
        assert tiny.counts().total_unequal == 0


@pytest.mark.slow
def test_integers_in_the_file_are_the_quantizers(integers: TinyPte) -> None:
    stored, expected, counts = integers.stored(), integers.weights.integers, integers.counts()
    assert sum(name.startswith("vision_tower.") for name in stored) == 2 * 6
    assert stored.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(stored[name].codes, weight.codes), name
        assert torch.equal(stored[name].scales, weight.scales), name
        assert counts.equal[name] == weight.codes.numel()
    name = "vision_tower.vision_model.encoder.layers.1.mlp.fc2.weight"
    changed = replace(expected[name], codes=expected[name].codes.clone())
    changed.codes[3, 4] ^= 1
    unequal = integers.counts({**expected, name: changed}).unequal
    assert {name: count for name, count in unequal.items() if count} == {name: 1}


@pytest.mark.slow
def test_the_vision_model_is_unloaded(tiny: TinyPte) -> None:
    """And loaded again for the next image."""
    session, images = tiny.session(), random_images(tiny.config, 2)
    first = session.encode_image(images[0])
    assert session._encoder is not None
    session.prefill(with_images(tiny.config, [2, None]), images[:1])
    assert session._encoder is None
    assert np.array_equal(session.encode_image(images[0]), first)
    assert not np.array_equal(session.encode_image(images[1]), first)


@pytest.mark.slow
def test_soft_tokens_can_be_fed_in_place_of_images(tiny: TinyPte) -> None:
    ids, images = with_images(tiny.config, [2, None, 3, None]), random_images(tiny.config, 2)
    session = tiny.session()
    encoded = [session.encode_image(image) for image in images]
    assert np.array_equal(session.prefill(ids, encoded), tiny.session().prefill(ids, images))


@pytest.mark.slow
def test_a_multimodal_file_is_refused_for_a_text_only_model(tiny: TinyPte, tmp_path: Path) -> None:
    text = replace(tiny.config, vision=None)
    with pytest.raises(BadInput, match="ExecuTorch does not load it"):
        PteSession(tiny.path, tiny.layout, text)


def test_a_chunk_shorter_than_an_image_is_refused(tmp_path: Path) -> None:
    config = tiny_vision_config("image-over-window")
    with pytest.raises(BadInput, match=r"chunk 15 is smaller than an image's 16 tokens"):
        export_pte(config, {}, cache_layout(config, "ring", 64, 15), [1], tmp_path / "model.pte")


def test_a_weight_that_must_be_floating_point(tmp_path: Path) -> None:
    config = tiny_vision_config()
    weights = dict(random_model(config).state_dict())
    name = "multi_modal_projector.mm_input_projection_weight"
    with pytest.raises(BadInput, match=f"{name} is quantized"):
        VisionEncoder(config, {**weights, name: round_to_nearest(weights[name], 8, None)})
