"""Measures the rates of this machine: matrix products, memory, collectives, copies, optimizers, NVMe.

run                starts the ranks and makes a cluster file of their measurements
microbenchmarks    what each rank measures
"""
