"""Other hosts: the launch target, hostfiles, ssh, and the command that each remote rank runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
