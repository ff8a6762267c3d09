"""What every package of the planner uses: errors, units, schemas, phases and tiers, files, machine probes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
