from .base import DataSource as DataSource
from .base import Samples as Samples
from .prepare.imagenet import PreparedImages as PreparedImages
from .prepare.imagenet import is_archive as is_archive
from .prepare.imagenet import prepare_images as prepare_images
from .prepare.tokenize import prepare_tokens as prepare_tokens
