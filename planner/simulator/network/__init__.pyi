from .group_share import GroupShare as GroupShare
from .model import MICRO_BATCHES as MICRO_BATCHES
from .model import SimulatedNetwork as SimulatedNetwork
from .model import replay as replay
from .ops import ACTIVATIONS as ACTIVATIONS
from .ops import DtypeSizes as DtypeSizes
