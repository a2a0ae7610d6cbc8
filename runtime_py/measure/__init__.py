"""What quantization cost, and how fast the files are."""
