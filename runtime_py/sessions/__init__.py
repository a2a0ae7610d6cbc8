"""One protocol for running a model, and its implementations."""
