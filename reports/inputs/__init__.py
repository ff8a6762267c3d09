"""Readers of what reports show: predictions of plans, measurements of runs, and records of benchmarks."""
