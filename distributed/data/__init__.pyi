from .base import DataSource as DataSource
from .base import Samples as Samples
from .tokenize import prepare_tokens as prepare_tokens
