from .imagenet import PreparedImages as PreparedImages
from .imagenet import is_archive as is_archive
from .imagenet import prepare_images as prepare_images
from .tokenize import prepare_tokens as prepare_tokens
