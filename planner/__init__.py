"""Exact costs and DeepSpeed plans of Translution models. Imports no torch, pandas or deepspeed."""
