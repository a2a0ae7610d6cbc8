"""Make the files that the peers run, each with its own converter, in one folder. What is there already stays.

checkpoint/               the checkpoint, linked, with tokenizer files that every converter reads
model.gguf                llama.cpp: the integers of one of our bundles
genai/                    onnxruntime-genai's own builder, int4
litert-RECIPE-CONTEXT/    LiteRT-LM: a file for each recipe and length of the caches
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.tokenizer import write_tokenizer
from gemma3.errors import BadInput
from gemma3.tokenizer import Tokenizer
from scripts.peers.same_integers import export_tensors

ROOT = Path(__file__).parents[2]
CHECKPOINT, GGUF, GENAI, LITERT = "checkpoint", "model.gguf", "genai", "litert"
# By the name in a table: a recipe of litert-torch. int4 weights, activations rounded to int8 where they are multiplied.
LITERT_RECIPES = {"block 32": "dynamic_wi4b32_afp32", "per channel": "dynamic_wi4_afp32"}
OPEN_WITH_LITERT_LM = "import litert_lm, sys; litert_lm.Engine(sys.argv[1], litert_lm.Backend.CPU())"
LITERT_FILE = "model.litertlm"
LITERT_CONTEXTS = (1280, 4096, 32768)


class SkippedError(Exception):
    """A peer that cannot be made or run here. The message says why."""


@dataclass(frozen=True)
class Environments:
    """Where the interpreters are: a folder with virtual environments named llama and litert."""

    folder: Path | None

    def python(self, name: str) -> str:
        """The interpreter of an environment. Raises SkippedError when it is not there."""
        if self.folder is None:
            raise SkippedError(f"its environment is not given; use --peers with a folder that has one named {name}")
        python = self.folder / name / "bin" / "python"
        if not python.exists():
            raise SkippedError(f"{python} does not exist; the help says how to install it")
        return str(python)


@dataclass(frozen=True)
class Step:
    """One file or folder in the working folder, and what writes it to a given path."""

    name: str
    output: str
    write: Callable[[Path], None]


def litert_folder(recipe: str, context: int) -> str:
    return f"{LITERT}-{LITERT_RECIPES[recipe]}-{context}"


def steps(
    checkpoint: Path, work: Path, bundles: Sequence[Path], environments: Environments, contexts: Sequence[int]
) -> list[Step]:
    """What there is to make, in the order in which it is made."""
    linked = work / CHECKPOINT

    def link(folder: Path) -> None:
        folder.mkdir()
        write_tokenizer(Tokenizer(checkpoint), checkpoint, folder, None)
        for file in [checkpoint / "config.json", *checkpoint.glob("*.safetensors*")]:
            (folder / file.name).symlink_to(file.resolve())

    def gguf(path: Path) -> None:
        python = environments.python("llama")
        with tempfile.TemporaryDirectory(dir=work) as name:
            refusals = []
            for bundle in bundles:
                try:
                    export_tensors(bundle, Path(name))
                except BadInput as error:
                    refusals.append(str(error))
                    continue
                run([python, "-m", "scripts.peers.write_gguf", name, str(path)])
                return
        raise SkippedError("; ".join(refusals) or "no --bundle to take the integers from")

    def genai(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=work) as name, tempfile.TemporaryDirectory(dir=work) as cache:
            for file in linked.iterdir():
                Path(name, file.name).symlink_to(file.resolve())
            config = json.loads((linked / "config.json").read_text(encoding="utf-8"))
            Path(name, "config.json").unlink()
            Path(name, "config.json").write_text(json.dumps(with_flat_rope(config)), encoding="utf-8")
            builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
            run([*builder, "-i", name, "-o", str(folder), "-p", "int4", "-e", "cpu", "-c", cache])

    def litert(recipe: str, context: int) -> Callable[[Path], None]:
        def convert(folder: Path) -> None:
            python = environments.python("litert")
            with tempfile.TemporaryDirectory() as stand_in:
                # litert-torch 0.10.0 imports a module of tensorflow, which it does not use here.
                module = Path(stand_in, "tensorflow", "lite", "python", "schema_py_generated.py")
                module.parent.mkdir(parents=True)
                module.touch()
                run(
                    [
                        str(Path(python).with_name("litert-torch")),
                        *("export_hf", str(linked), str(folder)),
                        *(f"--cache_length={context}", f"--quantization_recipe={LITERT_RECIPES[recipe]}"),
                    ],
                    {"PYTHONPATH": stand_in},
                )
            # The first start takes long: it writes the packed weights into a file beside the model.
            run([python, "-c", OPEN_WITH_LITERT_LM, str(folder / LITERT_FILE)])

        return convert

    return [
        Step("checkpoint", CHECKPOINT, link),
        Step("llama.cpp", GGUF, gguf),
        Step("onnxruntime-genai", GENAI, genai),
        *(
            Step(f"LiteRT-LM {recipe}, {context}", litert_folder(recipe, context), litert(recipe, context))
            for context in contexts
            for recipe in LITERT_RECIPES
        ),
    ]


def with_flat_rope(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with the keys of RoPE in rope_parameters too, without layer kinds, for onnxruntime-genai's builder.

    The builder of 0.18.0 looks for them there, while transformers 5, which it needs, has them by the kind of layer. Of
    this mixture transformers makes the same RoPE.
    """
    flat = {key: config[key] for key in ("rope_theta", "rope_local_base_freq")}
    return config | {"rope_parameters": {"rope_type": "default"} | flat}


def make(step: Step, work: Path) -> None:
    """Make what ``step`` describes, unless it is there. Nothing half-written stays. Raises SkippedError."""
    output = work / step.output
    if output.exists():
        return
    partial = work / f".{step.output}.partial"
    try:
        step.write(partial)
        partial.rename(output)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a converter, and say how long it took and how much memory. Raises SkippedError with its last line."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, **(environment or {})}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        written = output.read()
    took = f"{time.perf_counter() - start:.0f} s, peak {usage.ru_maxrss * 1024 / 1e9:.1f} GB"
    if process.returncode:
        raise SkippedError(f"{last_line(written)}; exit code {process.returncode} after {took}")
    print(f"    {took}", file=sys.stderr)


def last_line(text: str) -> str:
    """The last line that says something: the exception's, if the text ends with a traceback."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it printed nothing")
