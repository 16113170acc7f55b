"""Benchmarks: ``python -m bench.run`` (see ``--help``), ``pytest bench``, ``python -m bench.picture``."""
