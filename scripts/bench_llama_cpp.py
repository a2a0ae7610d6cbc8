"""Compare the decode and prefill speed of a bundle's files with llama.cpp on exactly the same integers (Q4_0).

    python -m scripts.bench_llama_cpp BUNDLE --llama-python VENV/bin/python

Export BUNDLE with ``--scheme int4-block32 --embedding int4``. The script reads the integers back from its .onnx and
writes them as a Q4_0 GGUF file, whose values (n − 8) · d are exactly ours. It needs the package gguf.
llama-cpp-python, which compiles for several minutes, may be in an environment of its own: pass the interpreter of that
environment. Each runtime has its own process, because thread pools disturb one another, and the runtimes take turns.
The result is a Markdown table. Its last columns compare each runtime's logits with those of the reference, the
quantized eager model.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# The interpreter that has llama-cpp-python runs this file too, so our packages are imported where they are used.


class Runner(Protocol):
    """One sequence of tokens in a runtime: what a worker times."""

    def reset(self) -> None: ...

    def prefill(self, ids: Sequence[int]) -> Any: ...

    def step(self, token: int) -> Any: ...


class LlamaCpp:
    """llama-cpp-python with its defaults, except for the number of threads and a bounded sliding-window cache."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        from llama_cpp import Llama

        self._llama = Llama(
            path, n_ctx=context, n_threads=threads, n_threads_batch=threads, swa_full=False, verbose=False
        )

    def reset(self) -> None:
        self._llama.reset()

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        self._llama.eval(ids)
        # The high-level API copies logits only when it is asked for those of all tokens.
        logits = self._llama._ctx.get_logits()
        return np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).copy()

    def step(self, token: int) -> np.ndarray:
        return self.prefill([token])


def open_runner(runtime: str, path: str, context: int, threads: int) -> Runner:
    if runtime == "llama.cpp":
        return LlamaCpp(path, context, threads)
    from runtime_py.backends import open_session

    return open_session(Path(path), "onnx" if runtime == ".onnx" else "pte", threads)


def work(runtime: str, path: str, context: int, threads: int) -> None:
    """A worker: for each request on stdin, feed the prompt to an empty cache, then the steps, and time every call.

    Requests and answers are JSON, one per line.
    """
    runner = open_runner(runtime, path, context, threads)
    for line in sys.stdin:
        request = json.loads(line)
        runner.reset()
        start = time.perf_counter()
        logits = runner.prefill(request["prompt"])
        seconds = [time.perf_counter() - start]
        np.save(request["logits"], logits)
        for token in request["steps"]:
            start = time.perf_counter()
            runner.step(token)
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"prefill": seconds[0], "decode": seconds[1:], "peak_kib": peak_kib()}), flush=True)


def peak_kib() -> int:
    """Peak memory of this process alone: getrusage would report the parent's peak if that is higher."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def measure_bandwidth(threads: int) -> None:
    """A worker: print how many bytes per second torch reads when it sums 1 GiB, the best of eight runs."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(1 << 28)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    print(data.nbytes / min(seconds))


def write_gguf(bundle: Path, path: Path) -> int:
    """Write the bundle's integers and norms as a Q4_0 file. Returns the number of bytes of its weights."""
    import gguf
    import torch

    from export.manifest import read_manifest
    from export.onnx.file import load_graph, read_initializer
    from export.onnx.read_back import stored_integers
    from quant.integers import IntegerWeight

    config = read_manifest(bundle).model
    graph_path = bundle / "model.onnx"

    def q4_0(weight: IntegerWeight) -> np.ndarray:
        """Blocks of 32: a float16 scale, then 16 bytes.

        The low nibble of byte j is code + 8 of element j, its high nibble that of element j + 16.
        """
        if weight.bits != 4 or weight.group_size != 32:
            raise SystemExit(
                "error: Q4_0 needs 4 bits in blocks of 32; export with --scheme int4-block32 --embedding int4"
            )
        rows, columns = weight.codes.shape
        codes = (weight.codes.to(torch.int16) + 8).to(torch.uint8).view(rows, columns // 32, 2, 16)
        scales = weight.scales.half().view(torch.uint8).view(rows, columns // 32, 2)
        return torch.cat((scales, codes[:, :, 0] | codes[:, :, 1] << 4), -1).view(rows, -1).numpy()

    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(config.global_rope.theta)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    # llama.cpp needs a vocabulary of the right size, but the text of its pieces is never used.
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<pad>", "<eos>", "<bos>", "<unk>", *(f"t{i}" for i in range(4, config.vocab_size))])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([3, 3, 3, 2] + [1] * (config.vocab_size - 4))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)

    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    }

    def gguf_name(name: str) -> str:
        if not name.startswith("model.layers."):
            return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"

    total = 0
    for name, weight in dict(stored_integers(graph_path)).items():  # a tied table comes twice
        packed = q4_0(weight)
        total += packed.nbytes
        writer.add_tensor(gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    for tensor in load_graph(graph_path).graph.initializer:
        if tensor.name.endswith("norm.weight"):  # both formats store 1 + weight
            norm = np.array(read_initializer(graph_path, tensor))
            total += norm.nbytes
            writer.add_tensor(gguf_name(tensor.name), norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


def eager_logits(bundle: Path, prompt: list[int]) -> np.ndarray:
    """Logits of the reference after ``prompt``, float32 [V]: the same integers, with float activations."""
    import torch

    from export.manifest import read_manifest
    from export.onnx.file import load_graph, read_initializer
    from export.onnx.read_back import stored_integers
    from gemma3.model import Gemma3
    from quant.eager import with_integer_weights

    graph_path = bundle / "model.onnx"
    model = Gemma3(read_manifest(bundle).model).eval().requires_grad_(False)
    with_integer_weights(model, dict(stored_integers(graph_path)))
    parameters = dict(model.named_parameters())
    for tensor in load_graph(graph_path).graph.initializer:
        if tensor.name.endswith("norm.weight"):
            parameters[tensor.name].copy_(torch.from_numpy(read_initializer(graph_path, tensor) - 1))
    return np.asarray(model(torch.tensor([prompt]), last_only=True)[0, 0].numpy())


def divergence(reference: np.ndarray, logits: np.ndarray) -> float:
    """KL(reference ‖ logits) in nats."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max()
        return np.asarray(x - np.log(np.exp(x).sum()))

    expected, seen = log_softmax(reference), log_softmax(logits)
    return float((np.exp(expected) * (expected - seen)).sum())


def kv_bytes_per_token(bundle: Path, position: int) -> int:
    """Bytes of the float32 keys and values that one step reads when the cache holds ``position`` tokens."""
    from export.manifest import read_manifest

    return sum(
        2 * 4 * spec.num_key_value_heads * spec.head_dim * min(position, spec.window or position)
        for spec in read_manifest(bundle).model.layers
    )


def start_worker(interpreter: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [interpreter, __file__, "--worker", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(worker: "subprocess.Popen[str]", request: dict[str, Any]) -> dict[str, Any]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(request) + "\n")
    worker.stdin.flush()
    answer: dict[str, Any] = json.loads(worker.stdout.readline())
    return answer


def compare(arguments: argparse.Namespace, threads: int, directory: Path, weight_bytes: int) -> None:
    """Run all runtimes with ``threads`` threads, and print their table."""
    from export.manifest import read_manifest

    manifest = read_manifest(arguments.bundle)
    random = np.random.default_rng(0)
    ids = random.integers(0, manifest.model.vocab_size, arguments.prompt + arguments.steps).tolist()
    prompt, steps = ids[: arguments.prompt], ids[arguments.prompt :]
    bandwidth = float(
        subprocess.check_output([sys.executable, __file__, "--worker", "bandwidth", "-", "0", str(threads)])
    )
    touched = weight_bytes + kv_bytes_per_token(arguments.bundle, len(ids))
    interpreters = {"llama.cpp": arguments.llama_python} | {
        f".{name}": sys.executable for name in sorted(manifest.artifacts)
    }
    workers = {}
    for runtime, interpreter in interpreters.items():
        path = directory / "model.gguf" if runtime == "llama.cpp" else arguments.bundle
        workers[runtime] = start_worker(interpreter, runtime, path, manifest.context, threads)
    answers: dict[str, list[dict[str, Any]]] = {runtime: [] for runtime in workers}
    for round_number in range(arguments.rounds + 1):
        for runtime, worker in workers.items():
            logits = str(directory / f"{runtime.strip('.')}.npy")
            answer = ask(worker, {"prompt": prompt, "steps": steps, "logits": logits})
            if round_number > 0:  # the first round is a warm-up
                answers[runtime].append(answer)
    for worker in workers.values():
        worker.communicate()

    decode = {
        runtime: statistics.median(second for answer in rounds for second in answer["decode"])
        for runtime, rounds in answers.items()
    }
    prefill = {
        runtime: arguments.prompt / statistics.median(answer["prefill"] for answer in rounds)
        for runtime, rounds in answers.items()
    }
    expected = eager_logits(arguments.bundle, prompt)
    print(f"\n{threads} thread{'s' if threads > 1 else ''}: the machine reads {bandwidth / 2**30:.1f} GiB/s;", end=" ")
    print(f"a step reads {touched / 1e6:.0f} MB, which takes at least {touched / bandwidth * 1e3:.1f} ms\n")
    print(
        "| | decode ms | tokens/s | × llama.cpp | prefill tokens/s | × llama.cpp | peak MiB | KL to reference | top-1 |"
    )
    print("|-|-|-|-|-|-|-|-|-|")
    for runtime, rounds in answers.items():
        logits = np.load(directory / f"{runtime.strip('.')}.npy")
        top = "same" if logits.argmax() == expected.argmax() else "different"
        print(
            f"| {runtime} | {decode[runtime] * 1e3:.2f} | {1 / decode[runtime]:.1f} "
            f"| {decode['llama.cpp'] / decode[runtime]:.2f} | {prefill[runtime]:.0f} "
            f"| {prefill[runtime] / prefill['llama.cpp']:.2f} | {rounds[-1]['peak_kib'] / 1024:.0f} "
            f"| {divergence(expected, logits):.1e} | {top} |"
        )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        runtime, path, context, threads = sys.argv[2:]
        if runtime == "bandwidth":
            measure_bandwidth(int(threads))
        else:
            work(runtime, path, int(context), int(threads))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="exported with --scheme int4-block32 --embedding int4")
    parser.add_argument("--llama-python", required=True, help="a Python interpreter that can import llama-cpp-python")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="one table for each number")
    parser.add_argument("--prompt", type=int, default=600, help="tokens in the cache before decoding")
    parser.add_argument("--steps", type=int, default=40, help="decode steps per round")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds; one more is the warm-up")
    arguments = parser.parse_args()
    from gemma3.errors import UserError

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        try:
            weight_bytes = write_gguf(arguments.bundle, directory / "model.gguf")
        except UserError as error:
            raise SystemExit(f"error: {error}") from None
        for threads in arguments.threads:
            compare(arguments, threads, directory, weight_bytes)


if __name__ == "__main__":
    main()
