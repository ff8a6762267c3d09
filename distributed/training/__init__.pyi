from .rank import run_rank as run_rank
from .rank import train as train
from .trainer import Trainer as Trainer
