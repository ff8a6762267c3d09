"""The parts of ``scripts/gpu_check.py``, and what runs them one after the other within a time limit.

main        the command line, and the list of parts with their limits
runner      starts each part as a process group, ends it at its limit, and records how it ended
results     what a part has found so far, on disk at every change
machine     the card, the driver and the versions; this machine as a cluster
ops         compiles DeepSpeed's ops in the background
parity      versions, and the tests of the operators on the device
operators   time and memory of every way to compute the operator, and of attention
rank        one rank that runs a plan for some steps, without a checkpoint
memory      what a context, products and NCCL hold; predicted and measured memory of some plans
times       the machine's rates; predicted and measured time of the same plans
transfers   optimizers, copies between host and device, the drive
largest     the largest full Translution that trains here
"""
