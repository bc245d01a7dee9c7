"""The Hub's fixtures for this folder; see `tests.hub.fixtures`."""

from tests.hub.fixtures import hub, hub_env, hub_server, pytest_configure

__all__ = ["hub", "hub_env", "hub_server", "pytest_configure"]
