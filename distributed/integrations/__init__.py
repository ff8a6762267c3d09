"""Plans for other training frameworks.

huggingface    arguments of Hugging Face's Trainer (`trainer_arguments`)
lightning      arguments of Lightning's Trainer (`lightning_options`)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
