import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gemma3.checkpoint import build_model, open_checkpoint, resolve_checkpoint
from gemma3.checkpoint import load_model as load
from gemma3.config import parse_config
from gemma3.errors import BadInput
from tests.shapes import SHAPES, VISION_SHAPES, random_model, random_tokens, tiny_vision_config


def state(shape: str) -> dict[str, torch.Tensor]:
    model = random_model(parse_config(SHAPES[shape]))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def write(path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, path / name)
        weight_map |= dict.fromkeys(part, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize("shape", ["like-270m", "untied"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loads(tmp_path: Path, shape: str, shards: int, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in state(shape).items()}
    checkpoint = open_checkpoint(write(tmp_path, SHAPES[shape], tensors, shards))
    assert sorted(checkpoint.names) == sorted(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in checkpoint.items())
    loaded = load(checkpoint)
    expected = random_model(checkpoint.config)
    expected.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=False)
    tokens = torch.tensor([random_tokens(checkpoint.config, 20)])
    assert torch.equal(loaded(tokens), expected(tokens))


@pytest.mark.parametrize("naming", ["released", "saved", "held"])
def test_names_of_multimodal_models(tmp_path: Path, naming: str) -> None:
    """As the released files have them, as transformers 5 saves them, and as it holds them in memory."""
    text, encoder, projector = {
        "released": ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector."),
        "saved": ("language_model.model.", "vision_tower.", "multi_modal_projector."),
        "held": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
    }[naming]
    model = random_model(tiny_vision_config())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    plain = {"model.": text, "vision_tower.vision_model.": encoder, "multi_modal_projector.": projector}
    stored = {
        nested + name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        for prefix, nested in plain.items()
        if name.startswith(prefix)
    }
    assert len(stored) == len(tensors)
    checkpoint = open_checkpoint(write(tmp_path, VISION_SHAPES["like-4b"], stored))
    assert sorted(checkpoint.names) == sorted(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in checkpoint.items())
    del stored[f"{encoder}post_layernorm.bias"]
    with pytest.raises(BadInput, match=r"post_layernorm\.bias missing"):
        open_checkpoint(write(tmp_path, VISION_SHAPES["like-4b"], stored))


def test_tied_model_that_stores_its_head(tmp_path: Path) -> None:
    tensors = state("like-270m")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    checkpoint = open_checkpoint(write(tmp_path, SHAPES["like-270m"], tensors))
    assert "lm_head.weight" not in checkpoint.names
    tensors["lm_head.weight"][3, 5] += 1
    with pytest.raises(BadInput, match="differs from its embedding table"):
        open_checkpoint(write(tmp_path, SHAPES["like-270m"], tensors))


def refusal(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals(tmp_path: Path) -> None:
    config, tensors = SHAPES["like-270m"], state("like-270m")
    key = "model.layers.3.mlp.up_proj.weight"
    rest = {name: tensor for name, tensor in tensors.items() if name != key}

    assert f"tensor {key} missing" in refusal(write(tmp_path, config, rest))
    assert "tensor model.extra not part of the model" in refusal(
        write(tmp_path, config, tensors | {"model.extra": torch.zeros(2)})
    )
    assert "has shape [96, 63], config.json asks for [96, 64]" in refusal(
        write(tmp_path, config, tensors | {key: torch.zeros(96, 63)})
    )
    assert f"{key} is I8" in refusal(write(tmp_path, config, tensors | {key: torch.zeros(96, 64, dtype=torch.int8)}))
    assert "model_type is 'llama'" in refusal(write(tmp_path, config | {"model_type": "llama"}, tensors))

    write(tmp_path, config, tensors)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "not a readable safetensors file" in refusal(tmp_path)
    whole = write(tmp_path, config, tensors) / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-100])
    assert "not a readable safetensors file" in refusal(tmp_path)
    whole.unlink()
    assert "holds neither model.safetensors nor" in refusal(tmp_path)


def test_damaged_shards(tmp_path: Path) -> None:
    path = write(tmp_path, SHAPES["like-270m"], state("like-270m"), shards=3)
    shard = path / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    assert "shard model-00002-of-00003.safetensors of 3 is missing" in refusal(path)
    shard.write_bytes(content)
    assert open_checkpoint(path)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "is not a plain file name" in refusal(path)
    for damaged in ("[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}'):
        index.write_text(damaged)
        assert "not a safetensors index" in refusal(path)
    index.write_text("{")
    assert "not readable as JSON" in refusal(path)
    index.write_text(json.dumps({"weight_map": {"a": "z" * 10_000}}))
    assert len(refusal(path)) < 400


@pytest.mark.parametrize("at", [3, 8, 9, 40, 500])
def test_a_flipped_byte_in_a_header(tmp_path: Path, at: int) -> None:
    path = write(tmp_path, SHAPES["like-270m"], state("like-270m"), shards=3)
    shard = path / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[at] ^= 0x55
    shard.write_bytes(content)
    assert len(refusal(path).splitlines()) == 1


@pytest.mark.parametrize("left", [0, 7, 100, 3000, -1])
def test_a_shard_that_ends_early(tmp_path: Path, left: int) -> None:
    """The header says how long the file must be, so no weight has to be read to find this."""
    path = write(tmp_path, SHAPES["like-270m"], state("like-270m"), shards=3)
    shard = path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:left])
    assert f"{shard.name}: not a readable safetensors file" in refusal(path)


def test_an_index_that_leaves_a_shard_out(tmp_path: Path) -> None:
    path = write(tmp_path, SHAPES["like-270m"], state("like-270m"), shards=3)
    index = path / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {name: "model-00001-of-00003.safetensors" for name in files}}))
    assert "missing; config.json expects 93 tensors; download it again" in refusal(path)


def test_names_that_torch_compile_made(tmp_path: Path) -> None:
    tensors = state("like-270m")
    expected = open_checkpoint(write(tmp_path / "plain", SHAPES["like-270m"], tensors)).names
    whole = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    inner = {name.replace("model.", "model._orig_mod.", 1): tensor for name, tensor in tensors.items()}
    for place, compiled in (("whole", whole), ("inner", inner)):
        checkpoint = open_checkpoint(write(tmp_path / place, SHAPES["like-270m"], compiled))
        assert checkpoint.names == expected
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in checkpoint.items())


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: f"base_model.model.{name}", "PEFT's names; merge the adapter"),
        (lambda name: name.replace("_proj.", "_proj.base_layer."), "PEFT's names; merge the adapter"),
        (lambda name: f"module.{name}", "a wrapper; unwrap the model"),
        (lambda name: name.replace("norm", "other"), "expects 93 tensors; download it again"),
    ],
)
def test_names_of_other_tools(tmp_path: Path, rename: Any, message: str) -> None:
    tensors = {rename(name): tensor for name, tensor in state("like-270m").items()}
    assert message in refusal(write(tmp_path, SHAPES["like-270m"], tensors))


def test_an_adapter_beside_a_whole_model_is_not_left_out_in_silence(tmp_path: Path) -> None:
    path = write(tmp_path, SHAPES["like-270m"], state("like-270m"))
    (path / "adapter_config.json").write_text("{}")
    assert "transformers would apply that adapter; merge it" in refusal(path)


def test_position_ids_that_older_versions_stored(tmp_path: Path) -> None:
    tensors = state("like-270m")
    expected = open_checkpoint(write(tmp_path / "plain", SHAPES["like-270m"], tensors)).names
    stored = tensors | {"vision_tower.vision_model.embeddings.position_ids": torch.arange(4)[None]}
    assert open_checkpoint(write(tmp_path / "old", SHAPES["like-270m"], stored)).names == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_model.safetensors", "", "holds an adapter without its model; merge it"),
        ("pytorch_model.bin", "", "holds weights as pytorch_model.bin only; save them as safetensors"),
        ("other", "", "holds neither model.safetensors nor"),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid", "a git-lfs pointer; fetch the file"),
        ("model.safetensors", "junk", "not a readable safetensors file"),
    ],
)
def test_advice_fits_what_is_there(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["like-270m"]))
    (tmp_path / name).write_text(content)
    assert message in refusal(tmp_path)
    if name.startswith("adapter"):
        (tmp_path / "config.json").unlink()
        assert message in refusal(tmp_path)


def test_a_hub_cache_whose_weights_are_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["like-270m"]))
    (tmp_path / "model.safetensors").symlink_to("../../blobs/0123abcd")
    assert "model.safetensors: no such file; download it again" in refusal(tmp_path)


def test_weights_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not stop root, which tests may run as."""
    path = write(tmp_path, SHAPES["like-270m"], state("like-270m"))

    def refuse(name: str, framework: str) -> None:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr("gemma3.checkpoint.safe_open", refuse)
    assert "not allowed to read it; make it readable" in refusal(path)


def test_a_vision_model_that_was_removed(tmp_path: Path) -> None:
    model = random_model(tiny_vision_config())
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    config = VISION_SHAPES["like-4b"]
    assert "the text model alone, remove vision_config from config.json" in refusal(write(tmp_path, config, text))
    alone = {key: value for key, value in config.items() if key != "vision_config"}
    assert sorted(open_checkpoint(write(tmp_path, alone, text)).names) == sorted(text)


def test_resolve(tmp_path: Path) -> None:
    assert resolve_checkpoint(str(tmp_path)) == tmp_path
    assert (resolve_checkpoint("demo") / "..").resolve().name == "gemma3"
    with pytest.raises(BadInput, match="does not exist; give a Hugging Face checkpoint directory"):
        resolve_checkpoint(str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        resolve_checkpoint(str(tmp_path / "file"))


def test_a_model_is_built_of_exactly_its_weights() -> None:
    config = parse_config(SHAPES["like-270m"])
    weights = state("like-270m")
    tokens = torch.tensor([random_tokens(config, 12)])
    assert torch.equal(build_model(config, weights.items())(tokens), random_model(config)(tokens))
    norm = "model.norm.weight"
    with pytest.raises(BadInput, match=f"weight {norm} is missing"):
        build_model(config, ((name, tensor) for name, tensor in weights.items() if name != norm))
    with pytest.raises(BadInput, match="weight vision is not part of the model"):
        build_model(config, [*weights.items(), ("vision", torch.ones(1))])
    with pytest.raises(BadInput, match=rf"weight {norm} has shape \[65\], config.json asks for \[64\]"):
        build_model(config, (weights | {norm: torch.ones(65)}).items())
