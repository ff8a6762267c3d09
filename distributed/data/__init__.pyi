from .tokenize import prepare_tokens as prepare_tokens
