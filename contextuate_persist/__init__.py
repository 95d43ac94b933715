"""Keeps what coding agents did: sessions and events in PostgreSQL or MySQL.

`open_store` opens a store; what it can do is documented at `PersistenceStore`.
"""

import logging

from contextuate_persist.aio import AsyncStore
from contextuate_persist.config import open_store
from contextuate_persist.errors import (
    ConfigurationError,
    InvalidBatch,
    InvalidRecord,
    PersistenceError,
    Refusal,
    SchemaError,
    SessionNotFound,
    StoreClosed,
    StoreRefused,
    StoreUnavailable,
)
from contextuate_persist.model import (
    Cursor,
    Health,
    MonitorEvent,
    SaveResult,
    SessionMeta,
    SessionNode,
    SessionStatus,
    TokenUsage,
)
from contextuate_persist.protocol import PersistenceStore

__version__ = "0.1.0.dev0"

__all__ = [
    "AsyncStore",
    "ConfigurationError",
    "Cursor",
    "Health",
    "InvalidBatch",
    "InvalidRecord",
    "MonitorEvent",
    "PersistenceError",
    "PersistenceStore",
    "Refusal",
    "SaveResult",
    "SchemaError",
    "SessionMeta",
    "SessionNode",
    "SessionNotFound",
    "SessionStatus",
    "StoreClosed",
    "StoreRefused",
    "StoreUnavailable",
    "TokenUsage",
    "open_store",
]

# Silent unless the application asks for more.
logging.getLogger("contextuate_persist").addHandler(logging.NullHandler())
