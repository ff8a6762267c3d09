from .huggingface import trainer_arguments as trainer_arguments
from .lightning import lightning_options as lightning_options
