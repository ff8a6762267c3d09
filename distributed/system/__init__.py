"""This machine: environment, packages, compiled ops, memory, file systems, network, signals."""

__all__: list[str] = []
