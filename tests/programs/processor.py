"""Imported by the fork server of ranks: all its forks know the processor."""

from __future__ import annotations

import cpuinfo

from translution.distributed.training.deepspeed_fixes import answer_for_processor

answer_for_processor()
cpuinfo.get_cpu_info()
