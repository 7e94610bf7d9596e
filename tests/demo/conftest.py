import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest
from demo_server import DEMO, Server, start_server, stop

# On a Space, the folder of the demo comes first on the path.
sys.path.insert(0, str(DEMO))


@pytest.fixture(scope="package", autouse=True)
def temporary_folder(tmp_path_factory) -> Iterator[None]:
    """Gradio stores images here, and its client leaves an empty folder for each file that it fetches."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        yield


@pytest.fixture(scope="session")
def second_model(tiny_folder, tmp_path_factory) -> str:
    """A checkpoint in a folder called "tiny"."""
    return str(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def catalogue(second_model):
    """A catalogue of the bundled model and a second one."""
    from model_catalogue import Catalogue
    from settings import Settings

    return Catalogue(Settings(models=(second_model,)))


@pytest.fixture(scope="session")
def laboratory(catalogue):
    from studies import Laboratory

    return Laboratory(catalogue)


@pytest.fixture(scope="session")
def server(second_model, tmp_path_factory) -> Iterator[Server]:
    """A running demo with a second model."""
    pytest.importorskip("gradio", reason="needs pip install pgseg-hf[demo]")
    running = start_server(tmp_path_factory.mktemp("server"), "--models", second_model)
    yield running
    stop(running)
    assert not list((running.folder / "tmp").glob("pgseg-demo-*")), "the demo left files behind"


@pytest.fixture(scope="session")
def street_file() -> str:
    return str(DEMO / "examples" / "green-jacket.jpg")
