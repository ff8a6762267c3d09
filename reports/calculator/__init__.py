"""The calculator: a web page that shows the costs of a model and its best plan on a cluster.

`choice` and `form` define what a user may choose, `search_pool` runs the searches in worker processes, `result` and
`pages` present what they found, and `server` answers HTTP requests.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
