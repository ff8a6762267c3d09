from .launcher import launch as launch
