"""Timings of every kernel against its baselines; see README.md here."""
