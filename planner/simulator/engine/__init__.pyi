from .base import OPTIMIZER_STATES as OPTIMIZER_STATES
from .base import OPTIMIZER_SWAP_BUFFERS as OPTIMIZER_SWAP_BUFFERS
from .base import SUB_GROUP_BUFFER as SUB_GROUP_BUFFER
from .base import EngineConfig as EngineConfig
from .coordinator import make_shards as make_shards
from .coordinator import make_sub_groups as make_sub_groups
