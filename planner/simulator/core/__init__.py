"""Storages with reference counts, an autograd tape, and memory tiers."""
