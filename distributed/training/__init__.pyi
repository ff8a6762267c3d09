from .trainer import Trainer as Trainer
from .trainer import run_rank as run_rank
from .trainer import train as train
