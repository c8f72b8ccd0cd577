"""What is claimed of speed, measured: run each from the top folder with ``python -m benchmarks.NAME``."""
