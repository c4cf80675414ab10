"""A server with the wire format of OpenAI's image API for DALL·E 2, over one model."""

from .app import ContentFilter, Settings, create
from .keys import Keys
from .serving import check_binding, listen, run

__all__ = ["ContentFilter", "Keys", "Settings", "check_binding", "create", "listen", "run"]
