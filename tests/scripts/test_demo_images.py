"""The images that the multimodal demo checkpoint is trained on and asked about."""

from itertools import combinations, islice
from pathlib import Path

import pytest
from PIL import Image

from gemma3.images import pan_and_scan_boxes
from scripts import demo_images
from scripts.demo_images import KINDS, NOTHING, Item, Kind, Scene, Scenes, is_held_out, view_labels


def scenes(kind: Kind, count: int, held_out: bool = False, seed: int = 3) -> list[Scene]:
    return list(islice(Scenes(kind, seed, held_out), count))


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_compositions_are_never_drawn_in_training(kind: Kind) -> None:
    shown = set().union(*(scene.compositions for scene in scenes(kind, 400)))
    assert shown
    assert not any(map(is_held_out, shown))


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_for_evaluation_shows_a_held_out_composition(kind: Kind) -> None:
    assert all(any(map(is_held_out, scene.compositions)) for scene in scenes(kind, 200, held_out=True))


def test_any_two_parts_of_a_held_out_composition_are_shown_together_in_training() -> None:
    shown = set().union(*(scene.compositions for kind in KINDS for scene in scenes(kind, 1000)))
    pairs = {pair for composition in shown for pair in combinations(composition, 2)}
    held_out = set().union(*(scene.compositions for kind in KINDS for scene in scenes(kind, 100, held_out=True)))
    assert all(pair in pairs for composition in held_out for pair in combinations(composition, 2))


def test_evaluation_asks_and_answers_with_words_of_training() -> None:
    def words(held_out: bool) -> set[str]:
        turns = (turn for kind in KINDS for scene in scenes(kind, 400, held_out) for turn in scene.turns)
        return {word for turn in turns for word in f"{turn.prompt} {turn.answer}".split()}

    assert words(held_out=True) <= words(held_out=False)


@pytest.mark.parametrize("kind", KINDS)
def test_images_follow_from_the_seed(kind: Kind) -> None:
    first, second = scenes(kind, 20), scenes(kind, 20)
    assert [(scene.items, scene.turns) for scene in first] == [(scene.items, scene.turns) for scene in second]
    assert [scene.image.tobytes() for scene in first] == [scene.image.tobytes() for scene in second]
    assert [scene.items for scene in scenes(kind, 20, seed=4)] != [scene.items for scene in first]


@pytest.mark.parametrize("kind", KINDS)
def test_items_lie_whole_and_apart_in_the_image(kind: Kind) -> None:
    for scene in scenes(kind, 200):
        width, height = scene.image.size
        boxes = [item.box for item in scene.items]
        assert all(left >= 0 and top >= 0 and right <= width and bottom <= height for left, top, right, bottom in boxes)
        for index, (left, top, right, bottom) in enumerate(boxes):
            for other in boxes[index + 1 :]:
                assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_each_item_of_a_wide_image_lies_whole_in_one_crop() -> None:
    for scene in scenes("wide", 200):
        crops = pan_and_scan_boxes(*scene.image.size)
        assert len(crops) in (3, 4)
        for item in scene.items:
            left, _, right, _ = item.box
            assert sum(crop[0] <= left and right <= crop[2] for crop in crops) == 1
        seen = [label for crop in crops for label in set(view_labels(scene, crop, 4)) - {NOTHING}]
        assert sorted(seen) == sorted((item.name, item.colour, "", "") for item in scene.items)


def test_labels_are_where_the_items_are() -> None:
    items = (Item("circle", "red", (30, 70), 20), Item("milk", "blue", (60, 10), 20))
    scene = Scene("word", demo_images.picture((80, 80), (255, 255, 255), items), items, ())
    labels = view_labels(scene, (0, 0, 80, 80), 4)
    circle, word = ("circle", "red", "bottom", "one"), ("milk", "blue", "top", "one")
    assert {index: label for index, label in enumerate(labels) if label != NOTHING} == {2: word, 3: word, 13: circle}
    assert view_labels(scene, (0, 40, 80, 80), 2).count(("circle", "red", "", "")) == 1


def test_files_hold_the_same_pixels_and_questions(tmp_path: Path) -> None:
    image = scenes("wide", 1)[0].image
    demo_images.save(image, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as read:
        assert read.convert("RGB").tobytes() == image.tobytes()
    assert (tmp_path / "a.png").stat().st_size < 4096
