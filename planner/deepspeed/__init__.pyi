from .config import aio_section as aio_section
from .config import check_training_state as check_training_state
from .config import config_warnings as config_warnings
from .config import deepspeed_config as deepspeed_config
from .frameworks import ACCELERATE_FILE as ACCELERATE_FILE
from .frameworks import TRAINER_CONFIG_FILE as TRAINER_CONFIG_FILE
from .frameworks import accelerate_config as accelerate_config
from .frameworks import trainer_config as trainer_config
