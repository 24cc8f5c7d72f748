"""Compile specs, one module a kernel file; see tests/kernels/aot/__init__.py."""
