from .rank_command import RankCommand as RankCommand
from .target import LaunchTarget as LaunchTarget
