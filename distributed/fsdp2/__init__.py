"""Trains a plan with torch's FSDP2 in place of DeepSpeed: the network in shards, and what a training script needs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
