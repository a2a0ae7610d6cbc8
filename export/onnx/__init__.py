"""The .onnx backend's graphs, files and reader."""
