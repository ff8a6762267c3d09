"""Imported by the fork server of ranks, after everything else: its forks need not do what this does."""

from __future__ import annotations

import gc

import cpuinfo

from translution.distributed.training.deepspeed_fixes import (
    answer_for_processor,
    ask_numa_once,
    import_muon_uncompiled,
    leave_compiler_out,
    probe_one_op,
)

import_muon_uncompiled()
leave_compiler_out()
answer_for_processor()
ask_numa_once()
cpuinfo.get_cpu_info()
probe_one_op()
# When DeepSpeed collects garbage, a fork would go through all that is imported here, and copy the memory of it.
gc.collect()
gc.freeze()
