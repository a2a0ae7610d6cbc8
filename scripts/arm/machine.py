"""An ARM machine without one: qemu in user mode, a small Debian for arm64, and the runtimes' wheels for aarch64.

Everything lies in one folder that git ignores, and is made once. ``Missing`` says what could not be had, in one line.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CONSTRAINTS = REPOSITORY / "constraints.txt"

QEMU, COMPILER = "qemu-aarch64", "aarch64-linux-gnu-g++"
# The Debian package of each program. qemu-user, not qemu-user-static: only the former can load a plugin.
PACKAGES = {QEMU: "qemu-user", COMPILER: "g++-aarch64-linux-gnu", "mmdebstrap": "mmdebstrap"}
SUITE, PYTHON = "bookworm", "python3.11"

# What a session over an .onnx imports, without torch.
ONNX_WHEELS = (
    *("onnxruntime", "onnx", "numpy", "flatbuffers", "ml_dtypes", "packaging", "pillow", "protobuf"),
    *("safetensors", "sentencepiece", "typing_extensions"),
)
# The first release whose wheel is a C++ SDK; the release in constraints.txt has no headers. It runs the same files.
EXECUTORCH = "1.5.1"
# The libraries of the C++ SDK that a program is linked with.
SDK = (
    *("executorch", "executorch_kernels_optimized", "executorch_kernels_quantized"),
    *("executorch_backend_xnnpack", "executorch_threadpool"),
)
# The library with llama.custom_sdpa and llama.update_cache also registers them with torch, so torch's libraries must
# load. These are named by torch's, but nothing of theirs is called, so empty ones do.
UNUSED = ("libtorch.so", "libcudart.so.13", "libcupti.so.13", "_C.cpython-311-aarch64-linux-gnu.so")
TORCH_LIBRARIES = ("libc10", "libtorch_cpu", "libarm_compute", "libnvpl", "libgfortran", "libgomp")

BASE = "fp asimd aes pmull sha1 sha2 crc32 cpuid"
NEWER = f"{BASE} evtstrm atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"


@dataclass(frozen=True)
class Cpu:
    """A processor that qemu plays. ONNX Runtime reads ``part`` and ``features`` from /proc/cpuinfo, and qemu would show
    the host's."""

    name: str
    model: str  # qemu's -cpu
    part: str
    features: str
    pte_model: str | None = None  # for a .pte, if another

    @property
    def cpuinfo(self) -> str:
        lines = (f"Features\t: {self.features}", "CPU implementer\t: 0x41", "CPU architecture: 8", "CPU variant\t: 0x1")
        one = "\n".join((*lines, f"CPU part\t: {self.part}", "CPU revision\t: 0"))
        return "".join(f"processor\t: {core}\nBogoMIPS\t: 50.00\n{one}\n\n" for core in range(os.cpu_count() or 1))


CPUS = (
    # torch's wheel, which a .pte needs (see UNUSED), has atomic operations that the Cortex-A53 does not. The A64FX has
    # them, and no dot products either.
    Cpu("cortex-a53", "cortex-a53", "0xd03", BASE, "a64fx"),
    Cpu("cortex-a76", "cortex-a76", "0xd0b", NEWER),  # dot products
    # i8mm. With SME, prefill in a .pte of one scale a row is wrong (docs/validation.md#on-arm).
    Cpu("max", "max,sme=off", "0xd40", f"{NEWER} i8mm bf16"),
)


class Missing(Exception):
    """Something that this machine lacks, in one line: what, and how to get it."""


def require(program: str) -> None:
    if shutil.which(program) is None:
        raise Missing(f"{program} is not installed; apt-get install {PACKAGES[program]}")


def pinned(names: Sequence[str]) -> list[str]:
    """``names`` as requirements with the versions of constraints.txt."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    versions = {line.partition("==")[0].lower().replace("_", "-"): line for line in lines if "==" in line}
    return [versions[name.lower().replace("_", "-")] for name in names]


@dataclass(frozen=True)
class Machine:
    """The ARM machine in the folder ``home``."""

    home: Path

    @property
    def site(self) -> Path:
        return self.home / "site"

    @property
    def sdk(self) -> Path:
        return self.home / "executorch" / "executorch"

    @property
    def runner(self) -> Path:
        return self.home / "run_pte"

    def root(self, cpu: Cpu) -> Path:
        """A Debian of its own for each processor, because each has its own /proc/cpuinfo."""
        return self.home / f"root-{cpu.name}"

    def make_root(self) -> None:
        """Raises Missing without qemu, or where Debian's packages cannot be had."""
        require(QEMU)
        plain = self.home / "root"
        if not plain.is_dir():
            require("mmdebstrap")
            self.home.mkdir(parents=True, exist_ok=True)
            part = fresh(self.home / "root.part")
            options = ["--variant=extract", "--architectures=arm64", f"--include={PYTHON},libstdc++6,libgomp1"]
            attempt(["mmdebstrap", "--quiet", *options, SUITE, str(part)], "Debian's packages for arm64")
            part.rename(plain)
        for cpu in CPUS:
            root = self.root(cpu)
            if not root.is_dir():
                part = fresh(self.home / f"root-{cpu.name}.part")
                # Devices and sockets are not needed; files are links to the same bytes.
                shutil.copytree(plain, part, symlinks=True, copy_function=os.link, ignore=lambda *_: {"dev"})
                part.rename(root)
            (root / "proc").mkdir(exist_ok=True)
            (root / "proc" / "cpuinfo").write_text(cpu.cpuinfo, encoding="ascii")

    def install_onnxruntime(self) -> None:
        """Raises Missing where the wheels cannot be had."""
        requirements = pinned(ONNX_WHEELS)
        if not holds(self.site, requirements):
            wheels = self.download(requirements)
            part = fresh(self.home / "site.part")
            for wheel in wheels:
                zipfile.ZipFile(wheel).extractall(part)
            replace(self.site, part, requirements)

    def install_executorch(self) -> None:
        """The C++ SDK, and torch's libraries, which its custom operators name. Raises Missing as ``download`` does."""
        require(COMPILER)
        unpacked, requirements = self.home / "executorch", [f"executorch=={EXECUTORCH}", *pinned(["torch"])]
        if not holds(unpacked, requirements):
            sdk, torch = self.download(requirements)
            part = fresh(self.home / "executorch.part")
            zipfile.ZipFile(sdk).extractall(part)
            with zipfile.ZipFile(torch) as archive:
                for name in archive.namelist():
                    if name.startswith(tuple(f"torch/lib/{library}" for library in TORCH_LIBRARIES)):
                        archive.extract(name, part)
            for name in UNUSED:
                empty = ["-shared", "-nostdlib", "-x", "c", "/dev/null", f"-Wl,-soname,{name}"]
                attempt([COMPILER, *empty, "-o", str(part / "torch" / "lib" / name)], "an empty library")
            replace(unpacked, part, requirements)
        source = Path(__file__).with_name("run_pte.cpp")
        if not self.runner.is_file() or self.runner.stat().st_mtime < source.stat().st_mtime:
            include = self.sdk / "include"
            c10 = include / "executorch/runtime/core/portable_type/c10"
            # The definitions with which the SDK was built (executorch-config.cmake).
            options = ["-std=c++17", "-O2", "-w", "-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_USE_THREADPOOL"]
            options += ["-DET_EVENT_TRACER_ENABLED", f"-I{include}", f"-I{c10}", f"-L{self.sdk / 'lib'}"]
            # Kernels and delegates register themselves, so nothing refers to their libraries.
            link = ["-Wl,--no-as-needed", *(f"-l{name}" for name in SDK), "-ldl"]
            attempt([COMPILER, *options, str(source), "-o", str(self.runner), *link], "the .pte runner")

    def download(self, requirements: Sequence[str]) -> list[Path]:
        """The wheels for aarch64, in the order of ``requirements``. Raises Missing where one cannot be had."""
        wheels = self.home / "wheels"
        options = [
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
            "--python-version=3.11",
        ]
        platforms = [f"--platform=manylinux_2_{glibc}_aarch64" for glibc in (28, 27, 26, 17)]
        command = [sys.executable, "-m", "pip", "download", *options, *platforms, "--platform=manylinux2014_aarch64"]
        attempt([*command, "--dest", str(wheels), *requirements], f"wheels for aarch64 ({', '.join(requirements)})")
        return [find_wheel(wheels, requirement) for requirement in requirements]

    def python(self, cpu: Cpu, module: str, *arguments: str) -> list[str]:
        """The command that runs a module of this repository with the ARM Python. Its environment: ``environment``."""
        return [*self.qemu(cpu, cpu.model), str(self.root(cpu) / "usr" / "bin" / PYTHON), "-m", module, *arguments]

    def pte_runner(self, cpu: Cpu, *arguments: str) -> list[str]:
        operators = self.sdk / "extension" / "llm" / "custom_ops" / "libcustom_ops_aot_lib.so"
        return [*self.qemu(cpu, cpu.pte_model or cpu.model), str(self.runner), *arguments, str(operators)]

    def qemu(self, cpu: Cpu, model: str) -> list[str]:
        return [QEMU, "-L", str(self.root(cpu)), "-cpu", model]

    @property
    def environment(self) -> Mapping[str, str]:
        """For qemu's guest; the host's programs have no use for it."""
        libraries = (self.home / "executorch" / "torch" / "lib", self.sdk / "lib")
        guest = {
            "PYTHONPATH": f"{self.site}:{REPOSITORY}",
            "PYTHONHASHSEED": "0",  # so that counted instructions can be repeated
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "OMP_NUM_THREADS": "1",
        }
        return {**os.environ, "QEMU_SET_ENV": ",".join(f"{name}={value}" for name, value in guest.items())}


def fresh(folder: Path) -> Path:
    """``folder``, without what an interrupted run left there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


VERSIONS = "versions.txt"


def holds(folder: Path, requirements: Sequence[str]) -> bool:
    """Was ``folder`` made of exactly these?"""
    noted = folder / VERSIONS
    return noted.is_file() and noted.read_text(encoding="ascii").split() == list(requirements)


def replace(folder: Path, part: Path, requirements: Sequence[str]) -> None:
    """Put ``part``, made of ``requirements``, in the place of ``folder``."""
    (part / VERSIONS).write_text("\n".join(requirements), encoding="ascii")
    fresh(folder)
    part.rename(folder)


def attempt(command: Sequence[str], what: str) -> None:
    """Run ``command``. Raises Missing with its last line if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise Missing(f"{what} cannot be had ({lines[-1].strip() if lines else f'exit code {done.returncode}'})")


def find_wheel(folder: Path, requirement: str) -> Path:
    """The wheel of ``name==version`` in ``folder``."""
    name, _, version = requirement.partition("==")
    prefix = f"{name.lower().replace('-', '_')}-{version}-"
    found = [path for path in folder.glob("*.whl") if path.name.lower().startswith(prefix.lower())]
    if not found:
        raise Missing(f"no wheel of {requirement} in {folder}; remove that folder and run this again")
    return found[0]
