"""The measurement of recipes, on a tiny model and one recipe."""

import sys
from pathlib import Path

import numpy as np
import pytest

from gemma3.checkpoint import open_checkpoint
from quant.recipe import KEPT, LINEARS, VISION_LINEARS, read_recipe
from runtime_py.measure.comparison import compare, stretches
from runtime_py.sessions.eager import open_eager
from runtime_py.sessions.protocol import every_position
from scripts import frontier
from scripts.peers.results import Depth, Row

RECIPES = Path(frontier.__file__).parent / "recipes"


def test_recipes_are_named_after_what_they_do() -> None:
    for path in RECIPES.glob("*.toml"):
        base = path.stem.split("-")[0]
        rules = [rule for rule in read_recipe(path).rules if rule not in (*KEPT, *VISION_LINEARS)]
        assert rules[-1].pattern == LINEARS
        if base in ("block32", "channel"):
            mixed = path.stem == "channel-mlp"
            assert rules[-1].scheme == ("int4-block32" if mixed else f"int4-{base}")


def test_a_recipe_is_measured_once(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["quality", str(checkpoint), str(tmp_path), "--recipes", str(RECIPES / "channel.toml")]
    options += ["--calibration", str(text), "--text", str(text), "--tokens", "60", "--formats", "onnx"]
    for measured in (3, 0):
        monkeypatch.setattr(sys, "argv", ["frontier", *options])
        frontier.main()
        assert capsys.readouterr().err.count("channel by") == measured
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quality"]
    points = [frontier.read(frontier.Point, file) for file in tmp_path.glob("quality/*.json")]
    assert {point.method for point in points} == {"rtn", "mse", "gptq"}
    for point in points:
        assert point.quality["onnx"].tokens == 60
        assert point.quality["onnx"].kl.value > 0
    monkeypatch.setattr(sys, "argv", ["frontier", "show", str(tmp_path)])
    frontier.main()
    header, _, row = capsys.readouterr().out.splitlines()
    methods = ("rtn", "mse", "gptq")
    columns = [f"{figure}, {method}" for figure in ("KL", "ΔNLL") for method in methods]
    assert [cell.strip() for cell in header.split("|")[3:-1]] == columns
    kl = {point.method: f"{point.quality['onnx'].kl.value:.5f}" for point in points}
    for cell, method in zip(row.split("|")[3:], methods, strict=False):
        assert cell.strip().startswith(kl[method])


def test_recorded_logits_are_those_of_the_stretches(checkpoint: Path, tmp_path: Path) -> None:
    original = open_eager(open_checkpoint(checkpoint), 96, 8)
    texts = stretches(list(range(100, 130)), 2, 12)
    for index, stretch in enumerate(texts):
        original.reset()
        np.save(tmp_path / f"{index}.npy", [logits for _, logits in every_position(original, stretch.ids)])
    recorded = frontier.Recorded(tmp_path, 96, original.vocab_size)
    figures = compare(recorded, {"original": original}, texts)["original"]
    assert (figures.tokens, figures.kl.value, figures.same_top.value) == (30, 0.0, 1.0)


def test_speeds_are_medians() -> None:
    row = Row("x .pte", "", 64, 2_000_000, 0.1, 0, (1.0, 2.0, 9.0), (Depth(32, 0, 0.0, (0.1, 0.05, 0.04), 0),))
    cells = frontier.speed_table([row], 32).splitlines()[-1].strip("|").split("|")
    assert [cell.strip() for cell in cells] == ["x .pte", "2", "16", "20.0"]


def test_more_decode_steps_than_the_caches_have_room_for_are_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("speed", str(checkpoint), str(tmp_path), "--rounds", "11", "--steps", "32")
    monkeypatch.setattr(sys, "argv", ["frontier", *arguments])
    with pytest.raises(SystemExit, match="take 374 positions, caches have room for 128"):
        frontier.main()
