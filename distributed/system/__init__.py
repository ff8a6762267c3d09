"""This machine: environment, packages, compiled ops, memory, file systems, network, signals."""
