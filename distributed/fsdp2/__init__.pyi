from .sharding import build_sharded as build_sharded
from .sharding import join_ranks as join_ranks
from .sharding import make_optimizer as make_optimizer
