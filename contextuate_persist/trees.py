"""Sessions in their trees, whatever cycles and orphans there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from contextuate_persist.model import SessionMeta, SessionNode


def forest(sessions: Iterable[SessionMeta], root: str | None = None) -> list[SessionNode]:
    """The sessions in tree order: from `root`, or from every root, siblings by start.

    Each session comes once, whatever cycles there are: a cycle begins at its smallest id.
    """
    ordered = sorted(sessions, key=lambda session: (session.start_time, session.session_id))
    by_id = {session.session_id: session for session in ordered}
    children: dict[str, list[SessionMeta]] = {}
    roots: list[SessionMeta] = []
    for session in ordered:
        parent = session.effective_parent_id
        if parent in by_id:
            children.setdefault(parent, []).append(session)
        else:
            roots.append(session)
    nodes: list[SessionNode] = []
    seen: set[str] = set()

    def walk(start: SessionMeta) -> None:
        stack = [SessionNode(start, 0)]
        while stack:
            node = stack.pop()
            if node.session.session_id in seen:
                continue
            seen.add(node.session.session_id)
            nodes.append(node)
            below = children.get(node.session.session_id, ())
            stack.extend(SessionNode(child, node.depth + 1) for child in reversed(below))

    if root is not None:
        walk(by_id[root])
        return nodes
    for session in roots:
        walk(session)
    for session in ordered:
        if session.session_id not in seen:
            walk(by_id[_cycle_start(session, by_id)])
    return nodes


def _cycle_start(session: SessionMeta, by_id: Mapping[str, SessionMeta]) -> str:
    """The smallest id of the cycle that this session hangs on."""
    path: dict[str, None] = {}
    session_id = session.session_id
    while session_id not in path:
        path[session_id] = None
        session_id = str(by_id[session_id].effective_parent_id)
    ids = list(path)
    return min(ids[ids.index(session_id) :])


def groups(links: Mapping[str, str | None]) -> list[list[str]]:
    """The ids that hang together through their parents, each group sorted."""
    leader: dict[str, str] = {}

    def find(node: str) -> str:
        while (above := leader.setdefault(node, node)) != node:
            leader[node] = leader.setdefault(above, above)
            node = above
        return node

    for child, parent in links.items():
        if parent is not None and parent in links:
            leader[find(child)] = find(parent)
    members: dict[str, list[str]] = {}
    for node in sorted(links):
        members.setdefault(find(node), []).append(node)
    return list(members.values())


def deepest_first(links: Mapping[str, str | None], roots: Iterable[str]) -> list[str]:
    """The roots and all ids below them, by their parents, each before the one above it."""
    children: dict[str, list[str]] = {}
    for node in sorted(links):
        parent = links[node]
        if parent is not None:
            children.setdefault(parent, []).append(node)
    found = dict.fromkeys(sorted(roots))
    queue = list(found)
    for node in queue:  # grows meanwhile
        below = [child for child in children.get(node, ()) if child not in found]
        found |= dict.fromkeys(below)
        queue += below
    return queue[::-1]


def linked_groups(links: Mapping[str, str | None]) -> list[list[str]]:
    """The same, also through parents that are no ids among them."""
    absent = {parent: None for parent in links.values() if parent is not None}
    found = groups({**absent, **links})
    return [group for ids in found if (group := [one for one in ids if one in links])]
