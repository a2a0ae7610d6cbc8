"""The process of one peer: it opens one file in one runtime, then feeds the tokens that it is sent and takes the time.

    INTERPRETER -m scripts.peers.worker '{"kind": "llama.cpp", "path": …, "context": 4096, "threads": 1, "steps": 16}'

It speaks JSON, one object a line. The first line says how long opening took. Then each request {"prefill": ids} or
{"decode": ids} gets an answer with the seconds. Where its "reset" is true, the cache is emptied before; where its
"logits" is a path and not empty, that file gets the last logits. The interpreter may be that of an environment without
our packages, so each runtime is imported where it is used. All of a runtime's options are its defaults, except for the
number of threads and the length of the cache.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

Open = Callable[[str, int, int, int], "Runner"]  # (path, context, threads, steps) → a runner


class Runner(Protocol):
    """A runtime with the cache of one sequence. ``decode`` feeds ids one by one, as generation does."""

    def reset(self) -> None: ...

    def prefill(self, ids: Sequence[int]) -> Any:
        """Feed ``ids``. Returns the logits after the last one, float32 [V], or None where the runtime hides them."""

    def before_decode(self) -> None:
        """What must come before ``decode``, and does not count."""

    def decode(self, ids: Sequence[int]) -> None: ...


class OneByOne:
    """``decode`` for the runtimes that take one id in the same way as many."""

    def before_decode(self) -> None:
        pass

    def prefill(self, ids: Sequence[int]) -> Any:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> None:
        for token in ids:
            self.prefill([token])


class Ours(OneByOne):
    def __init__(self, session: Any) -> None:
        self._session = session
        self.reset = session.reset

    def prefill(self, ids: Sequence[int]) -> Any:
        return self._session.prefill(ids)


def import_ours(format: str) -> Open:
    from export.manifest import read_manifest
    from runtime_py.backends import backend_of, open_graph

    backend = backend_of(format)
    backend.import_runtime()

    def open_bundle(path: str, context: int, threads: int, steps: int) -> Runner:
        return Ours(open_graph(Path(path), read_manifest(Path(path)), backend, threads))

    return open_bundle


class LlamaCpp(OneByOne):
    """llama-cpp-python, with sliding-window caches that are bounded, which is llama.cpp's own default."""

    def __init__(self, llama: Any) -> None:
        self._llama = llama
        self.reset = llama.reset

    def prefill(self, ids: Sequence[int]) -> Any:
        import numpy as np

        self._llama.eval(ids)
        # The high-level API copies logits only when it is asked for those of all tokens.
        logits = self._llama._ctx.get_logits()
        return np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).copy()


def import_llama_cpp() -> Open:
    from llama_cpp import Llama

    def open_gguf(path: str, context: int, threads: int, steps: int) -> Runner:
        return LlamaCpp(
            Llama(path, n_ctx=context, n_threads=threads, n_threads_batch=threads, swa_full=False, verbose=False)
        )

    return open_gguf


class GenAi(OneByOne):
    def __init__(self, library: Any, model: Any, context: int) -> None:
        self._library, self._model, self._context = library, model, context
        self.reset()

    def reset(self) -> None:
        self._generator: Any = None  # frees its cache before the next one is allocated
        parameters = self._library.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._context, batch_size=1)
        self._generator = self._library.Generator(self._model, parameters)

    def prefill(self, ids: Sequence[int]) -> Any:
        import numpy as np

        self._generator.append_tokens(np.array([ids], np.int32))
        return self._generator.get_logits().reshape(-1)


def import_genai() -> Open:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime_genai

    def open_folder(path: str, context: int, threads: int, steps: int) -> Runner:
        config = onnxruntime_genai.Config(path)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        return GenAi(onnxruntime_genai, onnxruntime_genai.Model(config), context)

    return open_folder


class Transformers(OneByOne):
    def __init__(self, model: Any) -> None:
        self._model = model
        self.reset()

    def reset(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)

    def prefill(self, ids: Sequence[int]) -> Any:
        import torch

        with torch.inference_mode():
            output = self._model(torch.tensor([ids]), past_key_values=self._cache, logits_to_keep=1)
        return output.logits[0, -1].float().numpy()


def import_transformers(dtype: str) -> Open:
    import torch
    from transformers import AutoModelForCausalLM

    def open_checkpoint(path: str, context: int, threads: int, steps: int) -> Runner:
        torch.set_num_threads(threads)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return Transformers(model.eval())

    return open_checkpoint


class LiteRtLm:
    """LiteRT-LM takes text alone. Gemma's tokenizer makes one token of each digit, so n digits are n tokens.

    It samples, and turns tokens into text, which the other runners do not do.
    """

    def __init__(self, engine: Any, steps: int) -> None:
        self._engine, self._steps = engine, steps
        self._session: Any = None
        self.reset()

    def reset(self) -> None:
        if self._session is not None:
            self._session.close()
        self._session = self._engine.create_session(apply_prompt_template=False, max_output_tokens=self._steps)

    def prefill(self, ids: Sequence[int]) -> None:
        self._session.run_prefill(["".join(str(token % 10) for token in ids)])

    def before_decode(self) -> None:
        self._session.run_prefill(["0"])  # it decodes only what follows a prompt

    def decode(self, ids: Sequence[int]) -> None:
        assert len(ids) == self._steps
        self._session.run_decode()
        decoded = self._session.get_benchmark_info().last_decode_token_count
        if decoded != len(ids):
            raise RuntimeError(f"it stopped after {decoded} of {len(ids)} tokens")


def import_litert_lm() -> Open:
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)

    def open_file(path: str, context: int, threads: int, steps: int) -> Runner:
        backend = litert_lm.Backend.CPU(thread_count=threads)
        return LiteRtLm(litert_lm.Engine(path, backend, max_num_tokens=context, enable_benchmark=True), steps)

    return open_file


# By kind: the package, and a function that imports it. What this returns opens a file.
RUNTIMES: dict[str, tuple[str, Callable[[], Open]]] = {
    ".onnx": ("onnxruntime", lambda: import_ours("onnx")),
    ".pte": ("executorch", lambda: import_ours("pte")),
    "llama.cpp": ("llama-cpp-python", import_llama_cpp),
    "LiteRT-LM": ("litert-lm", import_litert_lm),
    "onnxruntime-genai": ("onnxruntime-genai", import_genai),
    "transformers bf16": ("transformers", lambda: import_transformers("bfloat16")),
    "transformers float32": ("transformers", lambda: import_transformers("float32")),
}


def memory(key: str) -> int:
    """A figure of this process in bytes: VmHWM is its peak, VmRSS what it has now.

    Not getrusage, which would report the parent's peak where that is higher.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split(f"{key}:")[1].split()[0])


def main() -> None:
    request = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")  # what libraries print must not come between the answers
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    package, import_runtime = RUNTIMES[request["kind"]]
    open_path = import_runtime()
    libraries = memory("VmRSS")
    start = time.perf_counter()
    runner = open_path(request["path"], request["context"], request["threads"], request["steps"])
    seconds = time.perf_counter() - start
    answer(load_seconds=seconds, libraries_bytes=libraries, version=f"{package} {metadata.version(package)}")
    for line in sys.stdin:
        request = json.loads(line)
        if request["reset"]:
            runner.reset()
        logits = None
        if "prefill" in request:
            start = time.perf_counter()
            logits = runner.prefill(request["prefill"])
        else:
            runner.before_decode()
            start = time.perf_counter()
            runner.decode(request["decode"])
        seconds = time.perf_counter() - start
        if request["logits"] and logits is not None:
            import numpy as np

            np.save(request["logits"], logits)
        answer(seconds=seconds, peak_bytes=memory("VmHWM"))


if __name__ == "__main__":
    main()
