from .core import Event as Event
from .lifecycle import simulate as simulate
