"""Keeps what coding agents did: sessions and events in PostgreSQL or MySQL.

`open_store` opens a store; what it can do is documented at `PersistenceStore`.
"""

import logging

from contextuate_persist.aio import AsyncEventWriter, AsyncReceipt, AsyncStore
from contextuate_persist.config import open_store
from contextuate_persist.errors import (
    ConfigurationError,
    DamagedFile,
    InvalidBatch,
    InvalidRecord,
    PersistenceError,
    Refusal,
    SchemaError,
    SessionNotFound,
    SpoolError,
    SpoolFull,
    StorageFull,
    StoreClosed,
    StoreRefused,
    StoreUnavailable,
)
from contextuate_persist.model import (
    Cursor,
    Forgotten,
    Health,
    MessageUsage,
    MonitorEvent,
    SaveResult,
    SessionMeta,
    SessionNode,
    SessionStatus,
    TokenUsage,
)
from contextuate_persist.policy import PayloadPolicy
from contextuate_persist.protocol import PersistenceStore
from contextuate_persist.receipts import Receipt, WriterHealth
from contextuate_persist.writer import EventWriter

__version__ = "0.1.0.dev0"

__all__ = [
    "AsyncEventWriter",
    "AsyncReceipt",
    "AsyncStore",
    "ConfigurationError",
    "Cursor",
    "DamagedFile",
    "EventWriter",
    "Forgotten",
    "Health",
    "InvalidBatch",
    "InvalidRecord",
    "MessageUsage",
    "MonitorEvent",
    "PayloadPolicy",
    "PersistenceError",
    "PersistenceStore",
    "Receipt",
    "Refusal",
    "SaveResult",
    "SchemaError",
    "SessionMeta",
    "SessionNode",
    "SessionNotFound",
    "SessionStatus",
    "SpoolError",
    "SpoolFull",
    "StorageFull",
    "StoreClosed",
    "StoreRefused",
    "StoreUnavailable",
    "TokenUsage",
    "WriterHealth",
    "open_store",
]

# Silent unless the application asks for more.
logging.getLogger("contextuate_persist").addHandler(logging.NullHandler())
