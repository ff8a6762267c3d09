"""Simulation of DeepSpeed's engine: what it allocates at each ZeRO stage."""
