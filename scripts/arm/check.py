"""Run bundles on ARM and judge them by their proofs: `make test-arm`.

    python -m scripts.arm.check [BUNDLE …] [--cpus cortex-a53 cortex-a76 max] [--formats onnx pte] [--home .arm]

Without bundles it exports the demo checkpoints, text and vision, in int4-block32, int4-channel and sfp8. qemu plays the
processors. On each, ONNX Runtime's wheel for aarch64 runs the .onnx, and ExecuTorch's C++ SDK the .pte. The answers are
judged here, by the code and the limits of `gemma-edge validate`. Every integer of an .onnx is also read back through
ONNX Runtime's kernels there (check `integers`).

Because qemu is slow, only the start of the plan is fed, in the walks odd-sizes (prefill, twice) and one-by-one
(decode). It passes the window, four times its length, and several wraps of the caches. `--whole` feeds all of the plan.

What this machine lacks is skipped, by name. Exit code 0, or 5 if a check did not pass.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checks import Check
from export.manifest import GOLDEN, PLAN, Manifest, read_manifest
from export.onnx.read_back import read_back_onnx
from gemma3.images import network_input
from quant.integers import IntegerWeight
from runtime_py.proof.golden import ReferenceLogits, load_golden
from runtime_py.proof.limits import Tolerances, stricter, tolerances
from runtime_py.proof.plan import ODD_SIZES, ONE_BY_ONE, Plan
from runtime_py.proof.plan_file import load_plan
from runtime_py.proof.prove import check_hashes
from runtime_py.proof.walks import check_session, figures_of
from runtime_py.report import table
from scripts.arm.feed import Transcript, write_pixels
from scripts.arm.machine import CPUS, REPOSITORY, Cpu, Machine, Missing

CHECKPOINTS, SCHEMES = ("demo", "demo-vision"), ("int4-block32", "int4-channel", "sfp8")
VERIFICATION_FAILED = 5
# A recovered code may be this far from an integer. Kernels multiply by a scale and back; a wrong code is off by 1.
NEAR_INTEGER = 0.01
PAST = 8  # positions after the last of 4W
WALK, START = f"walk/{ONE_BY_ONE}", "landmark/first"


@dataclass(frozen=True)
class Case:
    """One file of a bundle on one processor."""

    bundle: Path
    format: str
    cpu: Cpu
    whole: bool = False  # all of the plan


@dataclass(frozen=True)
class Verdict:
    """What was found of a case: for each reference, by name, the checks against it; and checks without a reference.

    The file passes if it keeps to the limits of one of its references. There are no checks against references if the
    program on the ARM machine failed.
    """

    case: Case
    by_reference: dict[str, list[Check]]
    others: list[Check]
    seconds: float

    @property
    def reference(self) -> str | None:
        """Of the references whose limits the file keeps to, the nearest."""
        kept = (name for name, checks in self.by_reference.items() if all(check.passed for check in checks))
        return min(kept, key=self.distance, default=None)

    def distance(self, name: str) -> float:
        """The mean KL divergence from a reference, in the walk ONE_BY_ONE."""
        return figures_of(self.by_reference[name], self.case.format, WALK)["kl_mean"]

    @property
    def passed(self) -> bool:
        return self.reference is not None and all(check.passed for check in self.others)


def start_of(plan: Plan) -> Plan:
    """The walks ODD_SIZES and ONE_BY_ONE of ``plan``, up to shortly past four windows."""
    last = plan.landmarks["4W"] + PAST
    walks = {walk: up_to(plan.walks[walk], last) for walk in (ODD_SIZES, ONE_BY_ONE)}
    length = max(map(sum, walks.values()))
    images = [pair for pair in zip(plan.image_places, plan.image_numbers, strict=True) if pair[0] < length]
    return Plan(
        ids=plan.ids,
        walks=walks,
        landmarks={name: position for name, position in plan.landmarks.items() if position < length},
        image_places=tuple(place for place, _ in images),
        image_numbers=tuple(number for _, number in images),
    )


def up_to(lengths: Iterable[int], last: int) -> tuple[int, ...]:
    """The calls of a walk that end at the position ``last`` or before."""
    kept, end = [], 0
    for length in lengths:
        end += length
        if end > last + 1:
            break
        kept.append(length)
    return tuple(kept)


def proof_of(case: Case) -> tuple[Plan, dict[str, tuple[ReferenceLogits, Tolerances]]]:
    """The plan, and by name the references of a file with their limits, which are those of `gemma-edge validate`."""
    proof, golden = load_plan(case.bundle / PLAN), load_golden(case.bundle / GOLDEN)
    plan = proof.plan if case.whole else start_of(proof.plan)
    found: dict[str, tuple[ReferenceLogits, Tolerances]] = {}
    for name, one in proof.artifacts[case.format].items():
        within = tolerances(plan, golden[one.key], name)
        # The limits in the file are for all of its positions.
        found[name] = golden[one.key], stricter(within, one.tolerances) if case.whole else within
    return plan, found


def write_script(case: Case, manifest: Manifest, script: Path, pixels: Path) -> None:
    """Everything that ``check_session`` feeds to this file."""
    plan, references = proof_of(case)
    reference, within = next(iter(references.values()))
    transcript = Transcript(manifest, case.format, reference.images)
    check_session(transcript, plan, reference, case.format, within)
    script.write_text("\n".join(transcript.lines) + "\n", encoding="ascii")
    write_pixels(pixels, [network_input(image) for image in reference.images])


def judge(case: Case, manifest: Manifest, answers: NDArray[np.float32], script: str) -> dict[str, list[Check]]:
    """The checks of the ``answers`` to ``script`` against each reference of the file.

    Raises ValueError when answers are missing or left over, and AssertionError when they answer another script.
    """
    plan, references = proof_of(case)
    found = {}
    for name, (reference, within) in references.items():
        transcript = Transcript(manifest, case.format, reference.images, answers)
        found[name] = check_session(transcript, plan, reference, case.format, within)
        transcript.finish()
        assert transcript.lines == script.splitlines()
    return found


def check_multiplied(path: Path, values: NDArray[np.float32]) -> Check:
    """The check that ``values``, the matrices that run_onnx.py found, are the integers in the file ``path``."""
    equal = total = start = 0
    for _, weight in read_back_onnx(path):
        assert isinstance(weight, IntegerWeight)
        codes, scales = weight.codes.numpy(), weight.scales.numpy()
        part = values[start : start + codes.size].reshape(codes.shape)
        start += codes.size
        wide = np.repeat(scales, weight.group_size, axis=1)[:, : codes.shape[1]]
        equal += int((np.abs(part / wide - codes) < NEAR_INTEGER).sum())
        total += codes.size
    whole = start == len(values)
    name = f"integers that the kernels multiply are the file's ({equal} of {total})"
    return Check("onnx", "integers", "equal", name, equal / total if whole else 0.0, 1.0, whole and equal == total)


def run_case(machine: Machine, case: Case, work: Path) -> Verdict:
    """Raises RuntimeError when the program on the ARM machine fails."""
    start = time.monotonic()
    bundle, manifest = case.bundle, read_manifest(case.bundle)
    work.mkdir(parents=True, exist_ok=True)
    script, pixels, answers = work / "script.txt", work / "pixels.f32", work / "answers.f32"
    write_script(case, manifest, script, pixels)
    others = [check_hashes(bundle, manifest)]
    file = bundle / manifest.artifacts[case.format].file
    if case.format == "onnx":
        values = work / "values.f32"
        run(machine, machine.python(case.cpu, "scripts.arm.run_onnx", *map(str, (bundle, script, answers, values))))
        others.append(check_multiplied(file, np.fromfile(values, np.float32)))
    else:
        run(machine, machine.pte_runner(case.cpu, *map(str, (file, script, pixels, answers))))
    found = np.fromfile(answers, np.float32)
    by_reference = judge(case, manifest, found, script.read_text(encoding="ascii"))
    return Verdict(case, by_reference, others, time.monotonic() - start)


def run(machine: Machine, command: Sequence[str]) -> str:
    """What ``command`` writes to stderr. Raises RuntimeError with it when the command fails."""
    done = subprocess.run(
        command, env=dict(machine.environment), cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stderr


def export_demos(folder: Path) -> list[Path]:
    """The demo checkpoints in every scheme, each exported once."""
    bundles = []
    for checkpoint in CHECKPOINTS:
        for scheme in SCHEMES:
            bundle = folder / f"{checkpoint}-{scheme}"
            if not bundle.is_dir():
                command = [sys.executable, "-m", "cli", "export", checkpoint, "--scheme", scheme, "-o", str(bundle)]
                subprocess.run(command, cwd=REPOSITORY, check=True, stdout=sys.stderr)
            bundles.append(bundle)
    return bundles


def available(machine: Machine, formats: Sequence[str]) -> Iterator[str]:
    """The ``formats`` that can be run here. Prints a line for each that cannot."""
    installers: dict[str, Callable[[], None]] = {
        "onnx": machine.install_onnxruntime,
        "pte": machine.install_executorch,
    }
    try:
        machine.make_root()
    except Missing as missing:
        print(f"skipped: everything on ARM: {missing}")
        return
    for format in formats:
        try:
            installers[format]()
            yield format
        except Missing as missing:
            print(f"skipped: .{format} on ARM: {missing}")


def as_json(verdict: Verdict) -> dict[str, Any]:
    case = verdict.case
    return {
        **{"bundle": case.bundle.name, "format": case.format, "cpu": case.cpu.name, "seconds": verdict.seconds},
        "references": {name: [asdict(check) for check in checks] for name, checks in verdict.by_reference.items()},
        "others": [asdict(check) for check in verdict.others],
    }


HEADER = (
    *("bundle", "file", "cpu", "nearest reference", "KL at first", "KL mean", "limit", "KL max", "limit"),
    *("same top", "soft tokens", "integers", "seconds"),
)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    return table(HEADER, [_row(one) for one in verdicts], left=4)


def _row(verdict: Verdict) -> tuple[str, ...]:
    case = verdict.case
    if not verdict.by_reference:
        return (case.bundle.name, f".{case.format}", case.cpu.name, "FAILED", *[""] * (len(HEADER) - 4))
    name = verdict.reference or next(iter(verdict.by_reference))
    checks = verdict.by_reference[name]
    limits = {(check.id, check.metric): check.limit for check in checks}
    walk, first = (figures_of(checks, case.format, id) for id in (WALK, START))
    soft = [check.value for check in checks if check.metric == "soft_rms" and check.limit is not None]
    integers = figures_of(verdict.others, case.format, "integers")
    return (
        case.bundle.name,
        f".{case.format}",
        case.cpu.name,
        verdict.reference or "FAILED",
        f"{first['kl_max']:.1e}",
        *(
            part
            for metric in ("kl_mean", "kl_max")
            for part in (f"{walk[metric]:.1e}", _limit(limits.get((WALK, metric))))
        ),
        f"{walk['top1_agreement']:.1%}",
        f"{max(soft):.1e}" if soft else "",
        f"{integers['equal']:.0%}" if integers else "",
        f"{verdict.seconds:.0f}",
    )


def _limit(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def failures(verdict: Verdict) -> list[str]:
    """What a file does not keep to, of each reference: a line each, with the first check."""
    case = verdict.case
    lists = [*verdict.by_reference.items(), ("any", verdict.others)]
    broken = ((name, next((check for check in checks if not check.passed), None)) for name, checks in lists)
    return [
        f"{case.bundle.name} .{case.format} on {case.cpu.name}, reference {name}: {check.id} {check.metric} "
        f"{check.value:.3g}, limit {check.limit:.3g}"
        for name, check in broken
        if check is not None
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--cpus", nargs="+", choices=[cpu.name for cpu in CPUS], default=[cpu.name for cpu in CPUS])
    parser.add_argument("--formats", nargs="+", choices=("onnx", "pte"), default=("onnx", "pte"))
    parser.add_argument("--home", type=Path, default=REPOSITORY / ".arm", help="where everything is kept [.arm]")
    parser.add_argument("--whole", action="store_true", help="feed all of the plan, in all its walks")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at the same time [2]")
    options = parser.parse_args()

    machine = Machine(options.home.resolve())
    formats = list(available(machine, options.formats))
    if not formats:
        return 0
    bundles = [path.resolve() for path in options.bundles] or export_demos(machine.home / "bundles")
    cases = [
        Case(bundle, format, cpu, options.whole)
        for bundle in bundles
        for format in formats
        if format in read_manifest(bundle).artifacts
        for cpu in CPUS
        if cpu.name in options.cpus
    ]

    def finish(case: Case) -> Verdict:
        work = machine.home / "work" / f"{case.bundle.name}-{case.format}-{case.cpu.name}"
        try:
            verdict = run_case(machine, case, work)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed = Check(case.format, "run", "equal", "the program on the ARM machine ends well", 0.0, 1.0, False)
            verdict = Verdict(case, {}, [failed], 0.0)
        (work / "verdict.json").write_text(json.dumps(as_json(verdict), indent=1), encoding="utf-8")
        state = f"keeps to {verdict.reference}" if verdict.passed else "FAILED"
        print(f"{case.bundle.name} .{case.format} on {case.cpu.name}: {state}", file=sys.stderr, flush=True)
        return verdict

    with ThreadPoolExecutor(options.jobs) as pool:
        verdicts = list(pool.map(finish, cases))
    print(verdict_table(verdicts))
    print("\nLimits that are not kept (a file need not keep to all references):")
    print("\n".join(line for verdict in verdicts for line in failures(verdict)) or "none")
    passed = sum(verdict.passed for verdict in verdicts)
    print(f"{passed} passed, {len(verdicts) - passed} failed")
    return 0 if passed == len(verdicts) else VERIFICATION_FAILED


if __name__ == "__main__":
    sys.exit(main())
