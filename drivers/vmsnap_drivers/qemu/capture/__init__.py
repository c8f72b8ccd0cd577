"""Capturing a running QEMU through its monitor, whoever started it."""
