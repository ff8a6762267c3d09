from .launcher import LaunchResult as LaunchResult
from .launcher import launch as launch
