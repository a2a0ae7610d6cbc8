"""The .pte target: its graphs, and how its file is written and read back."""
