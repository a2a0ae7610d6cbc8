"""Running bundles from Python: sessions with one protocol, generation, validation, benchmarks, reports."""
