"""Checks before a launch, on this machine and on every host."""
