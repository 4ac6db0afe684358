"""How tests that need services are played beside each other: file by file, those that share a service one after the
other in one process."""

from __future__ import annotations

from pathlib import PurePosixPath

from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

# About as many seconds for each of two processes; whatever is not named comes last.
_ORDER = ("test_campaign", "test_kubernetes", "test_service", "test_scaling", "test_renewal", "test_nodes")


def group(nodeid: str) -> str:
    """Of a test: what has the same one shares a process."""
    stem = PurePosixPath(nodeid.partition("::")[0]).stem
    return "test_service" if stem.startswith("test_service") else stem


def turn(nodeid: str) -> int:
    """When its group is begun."""
    return _ORDER.index(group(nodeid)) if group(nodeid) in _ORDER else len(_ORDER)


class ByService(LoadScopeScheduling):  # type: ignore[misc]
    """In the order in which tests are collected."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
