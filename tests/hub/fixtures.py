"""Fixtures that start a Hub for a test and lead the real client to it.

`hub` is for tests in this process, `hub_env` for subprocesses; a test may use both, they are the same server:

    def test_a_push_says_where_it_went(hub: HubServer, hub_env: dict[str, str]) -> None:
        subprocess.run(["lopd-store", "push", ...], env=hub_env, check=True)
        assert "manifest.json" in hub.files("acme/art")

The client reads most of its settings (`HF_ENDPOINT`, `HF_HOME`, `HF_HUB_DISABLE_XET`, ...) only once, when
`huggingface_hub.constants` is imported, and other tests may have imported it long before. So `hub` sets the variables
and then makes the client read them again, by loading that one module anew; afterwards it does the same with the old
ones. Within a test `HfApi()`, `HfFileSystem()`, `snapshot_download()` and `hf://` paths therefore reach this server
and a fresh cache without any argument, and never the real Hub. Only the switch for progress bars is copied at import
and does not follow.

To share the fixtures with every folder of tests: `pytest_plugins = ["tests.hub.fixtures"]` in `tests/conftest.py`.
"""

import importlib
import os
from collections.abc import Iterator

import huggingface_hub
import pytest
from huggingface_hub import HfFileSystem, constants

from tests.hub.server import HubServer

SETTINGS = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE", "NO_PROXY", "no_proxy")  # the developer's own must not matter


def pytest_configure(config: pytest.Config) -> None:
    """Let the client upload to LFS in its own way, which its HTTP library deprecates and we cannot change."""
    config.addinivalue_line("filterwarnings", "ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    """A started server that this process's client knows nothing about."""
    with HubServer() as server:
        yield server


@pytest.fixture
def hub_env(hub_server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The whole environment for a subprocess whose client is to reach the server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    return kept | {
        "HF_ENDPOINT": hub_server.endpoint,
        "HF_TOKEN": hub_server.token,
        "HF_HOME": str(tmp_path_factory.mktemp("hf-home")),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }


@pytest.fixture
def hub(hub_server: HubServer, hub_env: dict[str, str]) -> Iterator[HubServer]:
    """A started server that this process's client reaches by default."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(SETTINGS)]:
            patch.delenv(name)
        for name in [name for name in hub_env if name.startswith(SETTINGS)]:
            patch.setenv(name, hub_env[name])
        _read_settings_again()
        yield hub_server
    _read_settings_again()


def _read_settings_again() -> None:
    importlib.reload(constants)
    huggingface_hub.close_session()
    HfFileSystem.clear_instance_cache()
