"""One protocol for running a model, and what implements it."""
