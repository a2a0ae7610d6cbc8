"""The .onnx target: its graphs, and how its files are written and read back."""
