import logging
import re
import shutil
from pathlib import Path

import pytest

from export import preflight as module
from export.bundle import cache_layouts
from export.executorch.target import PTE
from export.onnx.target import ONNX
from export.preflight import BASE, check_memory, fed, forms_in, need_of, preflight
from export.target import Target
from gemma3.checkpoint import open_checkpoint
from gemma3.errors import BadInput, DoesNotFit
from gemma3.host.memory import Room
from quant.quantize import quantize
from quant.recipe import scheme_recipe
from quant.source import Source
from quant.weights import ideal_bytes, shape_of
from runtime_py.api import export_bundle
from tests.bundles import SEEING_CONFIG, write_checkpoint

GB = 10**9
BOTH = (PTE, ONNX)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_checkpoint(write_checkpoint(tmp_path / "checkpoint"))


def run(source: Source, folder: Path, targets: tuple[Target, ...] = BOTH) -> module.Need:
    layouts = cache_layouts(source.config, targets, 96, 8)
    return preflight(source, targets, scheme_recipe("int4-block32"), layouts, folder)


@pytest.mark.parametrize("scheme", ["fp32", "int4-block32", "int4-channel", "sfp8"])
@pytest.mark.parametrize("seeing", [False, True])
def test_forms_are_those_of_the_quantized_weights(tmp_path: Path, scheme: str, seeing: bool) -> None:
    base = {"base": SEEING_CONFIG} if seeing else {}
    source = open_checkpoint(write_checkpoint(tmp_path / "checkpoint", **base))
    quantized = quantize(source, scheme_recipe(scheme))
    planned, made = forms_in(source, scheme_recipe(scheme)), quantized.weights
    assert list(planned) == list(made.forms)
    assert {name: shape_of(form) for name, form in planned.items()} == made.shapes
    assert ideal_bytes(planned.values()) == made.ideal_bytes
    assert forms_in(quantized, scheme_recipe(scheme)) is made.forms


def test_it_says_what_an_export_takes(source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        need = run(source, tmp_path)
    assert re.fullmatch(
        r"this takes about \d+ minutes? on two cores, \d\.\d GB of memory, 0\.1 GB of disk", caplog.messages[-1]
    )
    assert need.memory > BASE
    assert need.seconds > 0


def test_more_formats_need_more(source: Source, tmp_path: Path) -> None:
    both, pte, onnx = run(source, tmp_path), run(source, tmp_path, (PTE,)), run(source, tmp_path, (ONNX,))
    assert both.memory == max(pte.memory, onnx.memory)
    assert both.disk == pte.disk + onnx.disk - module.SMALL_FILES_BYTES
    assert both.seconds > max(pte.seconds, onnx.seconds)


def test_a_context_below_the_usual_sequence_needs_less_time(source: Source) -> None:
    forms = forms_in(source, scheme_recipe("int4-block32"))
    shorter, whole, longer = (fed(source.config, forms, context) for context in (4, 96, 10**6))
    assert shorter < whole == longer


def test_memory_that_does_not_fit(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = need_of(source, BOTH, scheme_recipe("int4-block32"), cache_layouts(source.config, BOTH, 96, 8)).memory
    monkeypatch.setattr(module, "memory_room", lambda: Room(needed // 2, 0))
    with pytest.raises(DoesNotFit, match=r"GB of memory are needed, 0\.\d GB are free; end other programs"):
        export_bundle(source, tmp_path / "out", context=96, chunk=8)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_disk_that_is_too_small(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(DoesNotFit, match=r"1 MiB free, the bundle needs 6\d MiB; make room"):
        export_bundle(source, tmp_path / "out", context=96, chunk=8)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("room", "refused", "warning"),
    [
        (None, False, ""),
        (Room(10 * GB, 0), False, ""),
        (Room(9 * GB, 0), False, "it may not be enough"),
        (Room(9 * GB, 4 * GB), False, "9.0 GB are free and 4.0 GB of swap: it may swap and take longer"),
        (Room(4 * GB, 5 * GB), False, "it may swap"),
        (Room(4 * GB, GB), True, ""),
        (Room(7 * GB, 0), True, ""),
        (Room(0, 0), True, ""),
    ],
)
def test_only_what_is_far_too_much_is_refused(
    room: Room | None, refused: bool, warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    if refused:
        with pytest.raises(DoesNotFit, match=r"about 10\.0 GB of memory are needed"):
            check_memory(10 * GB, room)
    else:
        check_memory(10 * GB, room)
    assert warning in caplog.text
    assert bool(warning) == bool(caplog.text)


def test_a_weight_without_a_rule_is_refused_as_ever(source: Source, tmp_path: Path) -> None:
    from quant.recipe import Recipe, Rule

    with pytest.raises(BadInput, match="no rule of recipe mine matches"):
        export_bundle(
            source, tmp_path / "out", recipe=Recipe("mine", (Rule("*norm*", "float32"),)), context=96, chunk=8
        )
