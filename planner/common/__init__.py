"""Errors, units, schemas, files and machine probes. Every other package of the planner builds on it."""
