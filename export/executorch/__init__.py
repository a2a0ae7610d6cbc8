"""The .pte backend's graphs, files and reader."""
