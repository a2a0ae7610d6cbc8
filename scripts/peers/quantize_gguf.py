"""Let llama.cpp quantize a GGUF file in float32, and say which types its matrices got.

    INTERPRETER -m scripts.peers.quantize_gguf FLOATS FILE Q4_K_M

The interpreter is that of an environment with the packages llama-cpp-python and gguf. Prints one JSON object: for each
type the number of weights. llama.cpp falls back to another type where 256 does not divide the columns.
"""

import json
import sys
from collections import Counter

import gguf
import llama_cpp


def main() -> None:
    source, path, name = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    code = llama_cpp.llama_model_quantize(source.encode(), path.encode(), parameters)
    if code:
        raise SystemExit(f"llama_model_quantize returned {code} for {name}")
    weights: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) == 2:
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
    print(json.dumps(weights))


if __name__ == "__main__":
    main()
