from .huggingface import trainer_arguments as trainer_arguments
