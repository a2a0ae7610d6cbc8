"""From a checkpoint and its quantized weights to the files that ship: .pte, .onnx and the bundle around them."""
