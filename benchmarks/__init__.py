"""Benchmarks of lpaf_kernels: ``python -m benchmarks --help``, and docs/benchmarks.md."""
