"""Count the instructions that a token takes on ARM, with a plugin of qemu: decoding and prefill of both files.

    python -m scripts.arm.count BUNDLE [--cpus cortex-a76 max] [--home .arm]

One thread. The count is the difference between two runs that differ in some calls, divided by the number of tokens in
them, so neither the start of the program nor the loading of the file is in it. An instruction is not a unit of time;
but unlike the seconds under qemu, the number is that of a phone with these kernels.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from export.manifest import PLAN, read_manifest
from runtime_py.proof.plan_file import load_plan
from runtime_py.report import table
from scripts.arm.check import available, run
from scripts.arm.machine import CPUS, REPOSITORY, Cpu, Machine

BEFORE, TOKENS = 64, 32  # so many tokens in the cache, and so many counted


def scripts(ids: Sequence[int], chunk: int) -> dict[str, tuple[list[str], int]]:
    """By name, the lines of a script and how many tokens it feeds more than ``base``."""
    base = [text(ids[:BEFORE])]
    more = ids[BEFORE : BEFORE + TOKENS]
    return {
        "base": (base, 0),
        "decode": (base + [text([token]) for token in more], len(more)),
        "prefill": ([*base, text(ids[BEFORE : BEFORE + chunk])], chunk),
    }


def text(ids: Sequence[int]) -> str:
    return "text " + " ".join(map(str, ids))


def build_plugin(machine: Machine) -> Path:
    """The plugin for the host, compiled with the host's compiler."""
    plugin, source = machine.home / "count_instructions.so", Path(__file__).with_name("count_instructions.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(plugin), str(source)], check=True)
    return plugin


def instructions(stderr: str) -> int:
    """The number that the plugin printed. Raises ValueError without one."""
    found = re.findall(r"^instructions (\d+)$", stderr, re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"no count in {stderr[-500:]!r}")
    return int(found[0])


def count(machine: Machine, plugin: Path, bundle: Path, format: str, cpu: Cpu) -> tuple[float, float]:
    """Instructions for a token of decoding, and for a token of prefill in a whole chunk."""
    manifest = read_manifest(bundle)
    work = machine.home / "work" / f"count-{bundle.name}-{format}-{cpu.name}"
    work.mkdir(parents=True, exist_ok=True)
    found, tokens = {}, {}
    for name, (lines, tokens[name]) in scripts(load_plan(bundle / PLAN).plan.ids, manifest.chunk).items():
        script, answers = work / f"{name}.txt", work / "answers.f32"
        script.write_text("\n".join(lines) + "\n", encoding="ascii")
        if format == "onnx":
            command = machine.python(cpu, "scripts.arm.run_onnx", *map(str, (bundle, script, answers)))
        else:
            file = bundle / manifest.artifacts[format].file
            command = machine.pte_runner(cpu, *map(str, (file, script, "/dev/null", answers)))
        command[1:1] = ["-plugin", str(plugin)]
        found[name] = instructions(run(machine, command))
    decode, prefill = ((found[name] - found["base"]) / tokens[name] for name in ("decode", "prefill"))
    return decode, prefill


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--cpus", nargs="+", choices=[cpu.name for cpu in CPUS], default=["cortex-a76", "max"])
    parser.add_argument("--home", type=Path, default=REPOSITORY / ".arm")
    options = parser.parse_args()
    machine, bundle = Machine(options.home.resolve()), options.bundle.resolve()
    formats = [format for format in available(machine, ("onnx", "pte")) if format in read_manifest(bundle).artifacts]
    plugin = build_plugin(machine)
    rows = []
    for format in formats:
        for cpu in (cpu for cpu in CPUS if cpu.name in options.cpus):
            decode, prefill = count(machine, plugin, bundle, format, cpu)
            rows.append((f".{format}", cpu.name, f"{decode / 1e6:.2f}", f"{prefill / 1e6:.2f}"))
    print(table(("file", "cpu", "decode, millions a token", "prefill, millions a token"), rows, left=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
