"""The teacher on another machine: what asks it over HTTP, and the service that `sekd serve` runs."""

from __future__ import annotations

from llamafactory_sekd.teacher.served.connection import TOKEN, Connection, NoAnswerError, speaks_our_protocol
from llamafactory_sekd.teacher.served.live_teacher import Answering, ServedTeacher, TicketCollator, fill_from_server
from llamafactory_sekd.teacher.served.protocol import ServerInfo, check_served_tokenizer
from llamafactory_sekd.teacher.served.vllm_teacher import VllmConnection


__all__ = [
    "TOKEN",
    "Answering",
    "Connection",
    "NoAnswerError",
    "ServedTeacher",
    "ServerInfo",
    "TicketCollator",
    "VllmConnection",
    "check_served_tokenizer",
    "fill_from_server",
    "speaks_our_protocol",
]
