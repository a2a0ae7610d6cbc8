"""Make a GGUF file of the folder that scripts/peers/same_integers.py wrote.

    INTERPRETER -m scripts.peers.write_gguf FOLDER FILE

The interpreter is that of an environment with the package gguf.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np


def main() -> None:
    folder, path = map(Path, sys.argv[1:])
    content = json.loads((folder / "tensors.json").read_text())
    writer = gguf.GGUFWriter(path, "gemma3")
    for name, value in content["metadata"]["add"].items():
        getattr(writer, f"add_{name}")(value)
    floats = all(tensor["type"] == "F32" for tensor in content["tensors"].values())
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if floats else gguf.LlamaFileType.MOSTLY_Q4_0)
    # llama.cpp needs a vocabulary of the right size, but the text of its pieces is never used.
    size = content["metadata"]["vocab_size"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<pad>", "<eos>", "<bos>", "<unk>", *(f"t{i}" for i in range(4, size))])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([3, 3, 3, 2] + [1] * (size - 4))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    for name, tensor in content["tensors"].items():
        data = np.load(folder / tensor["file"], mmap_mode="r")
        kind = None if tensor["type"] == "F32" else gguf.GGMLQuantizationType[tensor["type"]]
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
