"""The predicted time of a training step."""
