"""Building blocks of the simulator: reference-counted storages, an autograd tape, memory tiers."""
