"""This machine: environment, packages, compiled ops, memory, files, signals."""
