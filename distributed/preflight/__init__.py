"""Checks of the machines of a plan before a launch, on this machine and on every host."""
