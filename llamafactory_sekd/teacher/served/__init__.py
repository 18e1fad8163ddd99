"""The teacher on another machine: what asks it over HTTP, and the service that `sekd serve` runs."""

from __future__ import annotations

from llamafactory_sekd.teacher.served.connection import TOKEN, Connection
from llamafactory_sekd.teacher.served.live import ServedTeacher, TicketCollator
from llamafactory_sekd.teacher.served.protocol import ServerInfo
from llamafactory_sekd.teacher.served.remote_fill import fill_from_server
from llamafactory_sekd.teacher.served.tokens import check_served_tokenizer


__all__ = [
    "TOKEN",
    "Connection",
    "ServedTeacher",
    "ServerInfo",
    "TicketCollator",
    "check_served_tokenizer",
    "fill_from_server",
]
