from .config import aio_section as aio_section
from .config import check_training_state as check_training_state
from .config import config_warnings as config_warnings
from .config import deepspeed_config as deepspeed_config
