"""Plans for other training frameworks.

huggingface    arguments of Hugging Face's Trainer (`trainer_arguments`)
lightning      Lightning's DeepSpeed strategy (`deepspeed_strategy`)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
