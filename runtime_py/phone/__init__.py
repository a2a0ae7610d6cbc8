"""A phone behind adb: bundles are copied to the demo app, and measured in it."""
