"""Twenty tasks that store events at once, then one that reads back.

    python examples/async_quickstart.py

Takes its database as quickstart.py does: from CONTEXTUATE_DATABASE_URL, else a private PostgreSQL.
"""

import asyncio
import time
import uuid

from contextuate_persist import MonitorEvent, open_store
from contextuate_persist.aio import AsyncStore

NOW = time.time_ns() // 1_000_000


def command(session_id: str, step: int) -> MonitorEvent:
    return MonitorEvent(
        id=str(uuid.uuid4()),
        session_id=session_id,
        timestamp=NOW + step,
        machine_id="laptop",
        working_directory="/home/dev/shop",
        event_type="tool_call",
        hook_type="PreToolUse",
        data={"toolName": "Bash", "toolInput": {"command": f"make step-{step}"}},
    )


async def agent(store: AsyncStore, session_id: str) -> None:
    for step in range(5):
        await store.save_event(command(session_id, step))
    await store.update_session(session_id, status="completed", end_time=NOW + 5)


async def main() -> None:
    ids = [f"async-{uuid.uuid4().hex[:8]}" for _ in range(20)]
    async with AsyncStore(open_store()) as store:
        await asyncio.gather(*(agent(store, session_id) for session_id in ids))
        counts = await asyncio.gather(*map(store.event_counts, ids))
        print("stored", sum(count["tool_call"] for count in counts), "events")
        async for event in store.iter_events(session_id=ids[0]):
            print(event.timestamp - NOW, event.data["toolInput"]["command"])


asyncio.run(main())
