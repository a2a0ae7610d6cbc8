import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from gemma3.errors import BadInput
from quant.methods import quantize_weights
from quant.qat.loop import Settings, default_lr, train
from quant.qat.loss import Distillation, Loss
from quant.recipe import scheme_recipe
from quant.weights import QuantizedWeights
from tests.quant.qat.run import CONFIG, SEEING, flat, illustrated, networks, once, rows
from tests.shapes import random_model, with_images

ROOT = Path(__file__).parents[3]
SETTINGS = Settings(steps=6, batch=4, warmup=0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tiny_run(run: Path, settings: Settings = SETTINGS, **options: Any) -> QuantizedWeights:
    student, teacher, start = networks()
    return train(student, teacher, start, options.pop("tokens", rows()), settings, run, **options)


def assert_equal(left: QuantizedWeights, right: QuantizedWeights | dict[str, Tensor]) -> None:
    a, b = flat(left), right if isinstance(right, dict) else flat(right)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# Training


@pytest.mark.parametrize("scheme", ["int4-block32", "int4-channel", "sfp8"])
@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_training_brings_the_student_closer(tmp_path: Path, scheme: str, loss: Loss) -> None:
    student, teacher = random_model(CONFIG), random_model(CONFIG)
    start = quantize_weights(student.named_parameters(), scheme_recipe(scheme))
    tokens, unseen = rows(64), rows(16, seed=1000)

    def divergence() -> float:
        with torch.no_grad():
            return float(Distillation(student, teacher)(unseen)[1]) / unseen.numel()

    weights = train(student, teacher, start, tokens, Settings(steps=1, lr=1e-12, batch=4), tmp_path / "none")
    before = divergence()
    assert before > 0
    student = random_model(CONFIG)
    settings = Settings(steps=60, batch=8, warmup=0, lr=3e-3 if scheme != "sfp8" else 3e-4, loss=loss)
    weights = train(student, teacher, start, tokens, settings, tmp_path / "run")
    assert divergence() < 0.9 * before
    assert weights.verdicts.keys() == start.verdicts.keys()


def test_accumulating_gradients_changes_nothing_but_rounding(tmp_path: Path) -> None:
    whole, parts = tiny_run(tmp_path / "a"), tiny_run(tmp_path / "b", micro_batch=1)
    for name, tensor in flat(whole).items():
        if not name.endswith("codes"):
            torch.testing.assert_close(tensor, flat(parts)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Loss
) -> None:
    """Ctrl-C in the third step: the step is finished and saved, and resuming gives the very same weights."""
    settings = Settings(steps=6, batch=5, warmup=2, loss=loss)
    whole = tiny_run(tmp_path / "whole", settings)
    forward, calls = Distillation.forward, []

    def interrupt(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(*arguments)

    monkeypatch.setattr(Distillation, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "run", settings)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000003"]
    assert len(calls) == 3
    assert_equal(tiny_run(tmp_path / "run", settings, resume=True), whole)
    assert len(calls) == 6


def test_a_loss_that_is_not_a_number_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = Distillation.forward, []

    def spoil(*arguments: Any) -> Any:
        calls.append(1)
        return forward(*arguments) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(Distillation, "forward", spoil)
    with pytest.raises(BadInput, match=r"step 4: loss nan, .*step 2 is kept in .*run; start again with lr below"):
        tiny_run(tmp_path / "run", save_every=2)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000002"]


def test_sfp8_has_a_lower_default_learning_rate() -> None:
    assert default_lr(scheme_recipe("sfp8")) < default_lr(scheme_recipe("int4-channel"))


def test_progress_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run(tmp_path)
    assert capsys.readouterr().err.splitlines()[-1].startswith("6/6 loss ")


# Images


ENCODER = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"


def test_with_images_the_vision_model_trains_too(tmp_path: Path) -> None:
    student, teacher = random_model(SEEING), random_model(SEEING)
    start = quantize_weights(student.named_parameters(), scheme_recipe("int4-channel"))
    tokens, images, ignored = illustrated(24)
    unseen, unseen_images, _ = illustrated(30)
    pixels = torch.cat(unseen_images[24:]) / 255
    learned = unseen[24:] != ignored[0]

    def divergence() -> float:
        with torch.no_grad():
            return float(Distillation(student, teacher)(unseen[24:], None, learned, pixels)[1] / learned.sum())

    settings = Settings(steps=1, lr=1e-12, batch=3, warmup=0)
    train(student, teacher, start, tokens, settings, tmp_path / "none", images=images, ignored=ignored)
    before = divergence()
    student = random_model(SEEING)
    settings = Settings(steps=60, batch=6, warmup=0)
    weights = train(student, teacher, start, tokens, settings, tmp_path / "run", images=images, ignored=ignored)
    assert divergence() < 0.9 * before
    assert str(weights.verdicts[ENCODER]) == "int8-channel: trained"
    assert not torch.equal(weights.integers[ENCODER].codes, start.integers[ENCODER].codes)
    for name, weight in start.tensors.items():
        if isinstance(weight, Tensor):
            assert torch.equal(student.get_parameter(name), random_model(SEEING).get_parameter(name)), name


def test_without_images_the_vision_model_stays_as_it_was(tmp_path: Path) -> None:
    student = random_model(SEEING)
    start = quantize_weights(student.named_parameters(), scheme_recipe("int4-channel"))
    tokens = torch.tensor([with_images(SEEING, [16], seed=row) for row in range(4)])
    settings = Settings(steps=2, batch=2, warmup=0)
    weights = train(student, random_model(SEEING), start, tokens, settings, tmp_path, save_every=1)
    assert str(weights.verdicts[ENCODER]) == "int8-channel: round to nearest"
    assert torch.equal(weights.integers[ENCODER].codes, start.integers[ENCODER].codes)


def test_rows_one_by_one_add_up_to_the_batch_and_ignored_tokens_do_not_count() -> None:
    """Each row gets its own images, and one row has none; predictions of ignored tokens are left out."""
    teacher, student = random_model(SEEING), random_model(SEEING, seed=1)
    tokens, images, ignored = illustrated(3)
    distillation = Distillation(student, teacher)
    learned = tokens != ignored[0]
    parts = [distillation(tokens[row : row + 1], None, learned[row : row + 1], images[row] / 255) for row in range(3)]
    torch.testing.assert_close(distillation(tokens, None, learned, torch.cat(images) / 255), sum(parts))
    with torch.no_grad():
        logits = [
            model(tokens, soft_tokens=model.encode_images(torch.cat(images) / 255)).log_softmax(-1)[learned]
            for model in (student, teacher)
        ]
    kl = F.kl_div(logits[0], logits[1], reduction="sum", log_target=True)
    torch.testing.assert_close(sum(parts)[1], kl)


@pytest.mark.slow
def test_two_processes_equal_one_with_images_in_some_rows(tmp_path: Path) -> None:
    one, two = (
        finish(tmp_path / f"run{count}", tmp_path / f"out{count}", processes=count, images=True) for count in (1, 2)
    )
    assert one.keys() == two.keys()
    for name in one:
        if not name.endswith("codes"):
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


# Refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": Settings(steps=7, batch=4, warmup=0)}, ("steps 6", "now it is 7")),
        ({"settings": Settings(steps=6, batch=4, warmup=0, loss="sampled")}, ("loss full", "sampled")),
        ({"tokens": rows(seed=7)}, ("data",)),
        ({"identity": {"recipe": "int4-channel"}}, ("recipe int4-block32", "now it is int4-channel")),
    ],
)
def test_a_resume_with_something_else(tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]) -> None:
    options: dict[str, Any] = {"identity": {"recipe": "int4-block32"}, "save_every": 4}
    tiny_run(tmp_path, **options)
    with pytest.raises(BadInput) as caught:
        tiny_run(tmp_path, **(options | {"resume": True} | change))
    assert len(str(caught.value).splitlines()) == 1
    for word in words:
        assert word in str(caught.value)


def test_a_resume_with_another_teacher(tmp_path: Path) -> None:
    tiny_run(tmp_path, save_every=4)
    student, _, start = networks()
    with pytest.raises(BadInput, match="teacher"):
        train(student, random_model(CONFIG, seed=5), start, rows(), SETTINGS, tmp_path, resume=True)


def test_beginning_where_there_is_a_run_and_resuming_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="leave --resume out"):
        tiny_run(tmp_path, resume=True)
    tiny_run(tmp_path, save_every=4)
    with pytest.raises(BadInput, match="at step 4; give --resume"):
        tiny_run(tmp_path)


def test_a_teacher_with_another_vocabulary(tmp_path: Path) -> None:
    from tests.shapes import tiny_config

    student, _, start = networks()
    other = random_model(tiny_config("all-local", vocab_size=65))
    with pytest.raises(BadInput, match="vocabulary of 65, the student of 64"):
        train(student, other, start, rows(), SETTINGS, tmp_path)


@pytest.mark.parametrize(
    ("settings", "tokens", "words"),
    [
        (Settings(steps=0), rows(), "steps is 0"),
        (Settings(steps=1, lr=float("nan")), rows(), "lr is nan"),
        (SETTINGS, rows() + 1, "token 64 in the data"),
        (SETTINGS, rows() - 64, "token -"),
    ],
)
def test_settings_and_data_that_do_not_fit(tmp_path: Path, settings: Settings, tokens: Tensor, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        tiny_run(tmp_path, settings, tokens=tokens)
    assert list(tmp_path.iterdir()) == []


# Processes


def finish(run: Path, out: Path, *, processes: int, images: bool = False) -> dict[str, Tensor]:
    """The weights of a run, begun or resumed, after its end. Several processes run under torchrun."""
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    arguments = [sys.executable, *launch, "-m", "tests.quant.qat.run", str(run), str(out)]
    arguments += ["--images"] if images else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(out)


@pytest.mark.slow
def test_two_processes_equal_one_within_rounding_and_a_run_can_change_their_number(tmp_path: Path) -> None:
    """The state of step 4 is kept: another number of processes can continue from it to step 6."""
    expected = finish(tmp_path / "one", tmp_path / "a", processes=1)
    others = [
        finish(tmp_path / "two", tmp_path / "b", processes=2),
        finish(tmp_path / "two", tmp_path / "c", processes=1),
        finish(tmp_path / "one", tmp_path / "d", processes=2),
    ]
    for found in others:
        assert found.keys() == expected.keys()
        for name in expected:
            if not name.endswith("codes"):
                torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """After 20 SIGKILLs while steps are computed and saved, the run was always resumable, to the same weights."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.quant.qat.run"])
    steps, rng = 80, random.Random(0)

    def begin(run: str, out: str) -> Any:
        process = context.Process(target=once, args=(tmp_path / run, tmp_path / out, steps, 1))
        process.start()
        return process

    whole = begin("whole", "expected")
    whole.join()
    for _ in range(20):
        process, before = begin("run", "out"), list((tmp_path / "run").glob("step-*"))
        while process.is_alive() and list((tmp_path / "run").glob("step-*")) == before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    last = begin("run", "out")
    last.join()
    assert (whole.exitcode, last.exitcode) == (0, 0)
    expected, found = load_file(tmp_path / "expected"), load_file(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
