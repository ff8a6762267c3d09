from .sharding import build_sharded as build_sharded
from .sharding import join_ranks as join_ranks
from .sharding import make_optimizer as make_optimizer
from .steps import batch_loss as batch_loss
from .steps import learning_rate as learning_rate
from .steps import newest_step as newest_step
from .steps import training_steps as training_steps
