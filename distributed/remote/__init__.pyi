from .rank_command import RankCommand as RankCommand
from .rank_command import read_secrets as read_secrets
from .target import LaunchTarget as LaunchTarget
