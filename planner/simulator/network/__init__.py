"""Simulation of the networks: what each module allocates in forward and backward."""
