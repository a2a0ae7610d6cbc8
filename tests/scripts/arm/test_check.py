"""The host's side of `make test-arm`: what is fed, how answers are judged, and what is said where something is missing.

The program for the ARM machine that is Python runs here too, on this processor.
"""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export.checks import Check
from export.manifest import read_manifest
from runtime_py.api import export_bundle
from runtime_py.proof.plan import ODD_SIZES, ONE_BY_ONE
from runtime_py.proof.prove import validate
from scripts.arm import machine as arm
from scripts.arm.check import (
    Case,
    Verdict,
    available,
    check_multiplied,
    failures,
    judge,
    proof_of,
    up_to,
    verdict_table,
    write_script,
)
from scripts.arm.count import BEFORE, TOKENS, instructions, scripts
from scripts.arm.machine import CPUS, Machine, Missing, pinned
from scripts.arm.run_onnx import feed, weights
from tests.bundles import CONFIG, SEEING_CONFIG, write_checkpoint

FIRST = "int8-per-block"


@pytest.fixture(scope="module", params=[CONFIG, SEEING_CONFIG], ids=["text", "seeing"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arm")
    checkpoint = write_checkpoint(folder / "checkpoint", request.param)
    export_bundle(checkpoint, folder / "bundle", formats=["onnx"], context=96, chunk=8)
    return folder / "bundle"


def asked(case: Case, tmp_path: Path) -> tuple[Path, NDArray[np.float32]]:
    """The script of ``case``, and the answers of this machine."""
    script, answers = tmp_path / "script.txt", tmp_path / "answers.f32"
    write_script(case, read_manifest(case.bundle), script, tmp_path / "pixels.f32")
    feed(case.bundle, script, answers)
    return script, np.fromfile(answers, np.float32)


def checks_of(case: Case, script: Path, answers: NDArray[np.float32]) -> dict[str, list[Check]]:
    return judge(case, read_manifest(case.bundle), answers, script.read_text())


def test_the_whole_plan_gives_the_figures_of_validate(bundle: Path, tmp_path: Path) -> None:
    case = Case(bundle, "onnx", CPUS[0], whole=True)
    found = checks_of(case, *asked(case, tmp_path))[FIRST]
    assert {(one.id, one.metric, one.limit, one.passed) for one in found} == {
        (one.id, one.metric, one.limit, one.passed) for one in validate(bundle) if one.artifact == "onnx"
    }


def test_answers_that_are_wrong_fail(bundle: Path, tmp_path: Path) -> None:
    case = Case(bundle, "onnx", CPUS[0], whole=True)
    script, answers = asked(case, tmp_path)
    verdict = Verdict(case, checks_of(case, script, answers), [], 1.0)
    assert (verdict.passed, verdict.reference) == (True, FIRST)
    wrong = Verdict(case, checks_of(case, script, -answers), [], 1.0)
    assert (wrong.passed, wrong.reference) == (False, None)
    lines = failures(wrong)
    assert len(lines) == len(wrong.by_reference)
    assert f"bundle .onnx on cortex-a53, reference {FIRST}: " in lines[0]
    assert "FAILED" in verdict_table([wrong])
    assert "FAILED" not in verdict_table([verdict])
    crashed = Verdict(case, {}, wrong.by_reference[FIRST][-1:], 1.0)
    assert not crashed.passed
    assert "FAILED" in verdict_table([crashed])
    with pytest.raises(ValueError, match="numbers answered"):
        checks_of(case, script, answers[:-1])
    with pytest.raises(ValueError, match="numbers answered"):
        checks_of(case, script, np.append(answers, np.float32(0)))


def test_answers_to_another_script_are_not_judged(bundle: Path, tmp_path: Path) -> None:
    case = Case(bundle, "onnx", CPUS[0], whole=True)
    script, answers = asked(case, tmp_path)
    script.write_text(script.read_text().replace("text", "text 5", 1))
    with pytest.raises(AssertionError):
        checks_of(case, script, answers)


def test_every_weight_is_found_as_the_kernels_multiply_it(bundle: Path, tmp_path: Path) -> None:
    values = tmp_path / "values.f32"
    weights(bundle, values)
    found, path = np.fromfile(values, np.float32), bundle / "model.onnx"
    assert check_multiplied(path, found).passed
    largest = int(np.abs(found).argmax())
    found[largest] *= 6 / 7  # 7 or 8 is the largest code, so this is another
    check = check_multiplied(path, found)
    assert not check.passed
    assert check.value == pytest.approx(1 - 1 / len(found))
    assert not check_multiplied(path, np.append(found, np.float32(0))).passed


def test_the_start_of_the_plan(bundle: Path) -> None:
    case = Case(bundle, "onnx", CPUS[0])
    plan, references = proof_of(case)
    assert list(plan.walks) == [ODD_SIZES, ONE_BY_ONE]
    assert sum(plan.walks[ONE_BY_ONE]) > plan.landmarks["4W"]
    for reference, within in references.values():
        assert within[f"walk/{ONE_BY_ONE}"]
        assert len(reference.positions)
    assert up_to((2, 3, 4), 4) == (2, 3)
    assert up_to((2, 3, 4), 3) == (2,)


def test_what_is_missing_is_skipped_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert list(available(Machine(tmp_path), ("onnx", "pte"))) == []
    assert capsys.readouterr().out == (
        "skipped: everything on ARM: qemu-aarch64 is not installed; apt-get install qemu-user\n"
    )
    monkeypatch.setattr(Machine, "make_root", lambda _: None)
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert list(available(Machine(tmp_path), ("onnx", "pte"))) == []
    onnx, pte = capsys.readouterr().out.splitlines()
    assert onnx.startswith("skipped: .onnx on ARM: wheels for aarch64 (onnxruntime==")
    assert pte == (
        "skipped: .pte on ARM: aarch64-linux-gnu-g++ is not installed; apt-get install g++-aarch64-linux-gnu"
    )


def test_the_last_line_of_a_command_is_the_reason() -> None:
    with pytest.raises(Missing, match=r"^it cannot be had \(no such thing\)$"):
        arm.attempt(["sh", "-c", "echo first; echo no such thing >&2; exit 1"], "it")


def test_versions_are_those_of_the_constraints() -> None:
    assert pinned(["onnxruntime", "typing-extensions"])[0].startswith("onnxruntime==1.")
    with pytest.raises(KeyError):
        pinned(["no-such-package"])


def test_a_folder_is_made_again_for_other_versions(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    arm.replace(tmp_path / "made", tmp_path / "part", ["a==1", "b==2"])
    assert arm.holds(tmp_path / "made", ["a==1", "b==2"])
    assert not arm.holds(tmp_path / "made", ["a==1", "b==3"])
    assert not arm.holds(tmp_path / "other", ["a==1"])


def test_each_processor_shows_its_own_features() -> None:
    features = {cpu.name: set(cpu.cpuinfo.split("Features\t: ")[1].splitlines()[0].split()) for cpu in CPUS}
    assert "asimddp" not in features["cortex-a53"]
    assert features["cortex-a76"] - features["cortex-a53"] >= {"asimddp"}
    assert features["max"] - features["cortex-a76"] == {"i8mm", "bf16"}


def test_a_pte_runs_on_a_processor_with_torchs_atomics(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert "cortex-a53" in machine.python(CPUS[0], "scripts.arm.run_onnx")
    assert "a64fx" in machine.pte_runner(CPUS[0], "model.pte")
    assert "cortex-a76" in machine.pte_runner(CPUS[1], "model.pte")


def test_counts() -> None:
    assert instructions("noise\ninstructions 123\n") == 123
    with pytest.raises(ValueError, match="no count"):
        instructions("noise")
    lines = scripts(range(1000), 128)
    assert lines["decode"][0][0] == lines["prefill"][0][0] == lines["base"][0][0]
    assert (len(lines["decode"][0]), lines["decode"][1]) == (1 + TOKENS, TOKENS)
    assert (len(lines["prefill"][0]), lines["prefill"][1]) == (2, 128)
    assert len(lines["prefill"][0][1].split()) == 1 + 128
    assert lines["base"][0][0].split()[-1] == str(BEFORE - 1)
