from .choice import Choice as Choice
from .pages import query_of as query_of
from .search_pool import popular_choices as popular_choices
from .server import is_loopback as is_loopback
from .server import serve as serve
