from .estimate import NOT_ALLOCATED as NOT_ALLOCATED
from .estimate import BreakdownItem as BreakdownItem
from .estimate import MemoryEstimate as MemoryEstimate
from .estimate import estimate_memory as estimate_memory
from .estimate import summarize_simulation as summarize_simulation
from .timeline import Timeline as Timeline
from .timeline import TimelinePoint as TimelinePoint
from .timeline import make_timeline as make_timeline
