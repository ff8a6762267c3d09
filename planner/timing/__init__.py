"""Predicted time of a training step, and of a run."""
