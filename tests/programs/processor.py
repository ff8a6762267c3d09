"""Imported by the fork server of ranks: all its forks know the processor, which takes seconds to find out."""

from __future__ import annotations

import cpuinfo

from translution.distributed.training.deepspeed_fixes import cache_processor

cache_processor()
cpuinfo.get_cpu_info()
