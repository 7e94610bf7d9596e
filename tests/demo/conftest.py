import sys
from collections.abc import Iterator

import pytest
from demo_server import DEMO, Server, start_server, stop

# A Space runs with its own folder in front.
sys.path.insert(0, str(DEMO))


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    pytest.importorskip("gradio", reason="needs pip install pgseg-hf[demo]")
    running = start_server(tmp_path_factory.mktemp("server"))
    yield running
    stop(running)
    assert not list((running.folder / "tmp").glob("pgseg-demo-*")), "the demo left files behind"


@pytest.fixture(scope="session")
def street_file() -> str:
    return str(DEMO / "examples" / "green-jacket.jpg")
