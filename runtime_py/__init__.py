"""Running bundles from Python: sessions with one protocol, generation, validation, benchmarks, reports."""

import os

# ONNX Runtime's wheels would write a device id and a queue of events for their maker below the home directory. They
# read this variable when they are imported, so it is set before any file of this package can do that.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
