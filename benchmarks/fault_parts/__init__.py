"""The parts of the fault table (scripts/faults.py).

trial       a run that is disturbed: how it is started, what it says, how long it takes to end, and what is left
processes   faults of processes: killed, stopped, asked to end, out of memory
files       faults of files and drives: full, read-only, slow, deleted, damaged, exchanged
table       does the trials and writes the table
"""
