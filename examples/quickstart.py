"""Save a session with a sub-agent and a few events, ask for them, draw the tree.

    python examples/quickstart.py

Without configuration it runs a private PostgreSQL (`pip install 'contextuate-persist[embedded]'`).
With CONTEXTUATE_DATABASE_URL it uses that PostgreSQL or MySQL database, in which
`contextuate-persist init` has to create the schema once, by the database owner's account.
"""

import time
import uuid

from contextuate_persist import MonitorEvent, SessionMeta, TokenUsage, open_store

now = time.time_ns() // 1_000_000
run = uuid.uuid4().hex[:8]
main, child = f"quickstart-{run}", f"quickstart-{run}-agent"


def event(
    session_id: str, after: int, event_type: str, hook_type: str, **data: object
) -> MonitorEvent:
    return MonitorEvent(
        id=str(uuid.uuid4()),
        session_id=session_id,
        parent_session_id=main if session_id == child else None,
        timestamp=now + after,
        machine_id="laptop",
        working_directory="/home/dev/shop",
        event_type=event_type,
        hook_type=hook_type,
        data=data,
    )


with open_store() as store:
    place = {"machine_id": "laptop", "working_directory": "/home/dev/shop"}
    used = TokenUsage(total_input=15_400, total_output=3_200)
    store.save_sessions(
        [
            SessionMeta(session_id=main, start_time=now, label="Fix it", token_usage=used, **place),
            SessionMeta(session_id=child, start_time=now + 5, parent_session_id=main, **place),
        ]
    )
    command = {"toolName": "Bash", "toolInput": {"command": "make test"}}
    events = [
        event(main, 0, "user_prompt", "UserPromptSubmit", message="The total is wrong"),
        event(main, 3, "tool_call", "PreToolUse", **command),
        event(child, 6, "tool_call", "PreToolUse", toolName="Grep", toolInput={"pattern": "total"}),
    ]
    print("stored", store.save_events(events), "events; again:", store.save_events(events))
    for found in store.find_events(session_id=main, tool_name="Bash"):
        print("Bash:", found.data["toolInput"])
    for node in store.session_tree(main):
        print(
            "  " * node.depth + node.session.session_id, store.event_counts(node.session.session_id)
        )
