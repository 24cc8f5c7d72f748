"""Compile specs, one module a kernel file; see tests/aot.py."""
