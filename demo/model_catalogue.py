"""The models that visitors can choose from, and the checks that keep them from reading other files."""

import contextlib
import re
import tempfile
import threading
from pathlib import Path
from weakref import WeakValueDictionary

import httpx
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from limits import watch
from settings import Settings, is_zerogpu
from transformers import PreTrainedConfig

from pgseg_hf import (
    DEFAULT_CHECKPOINT,
    PGSegImageProcessorPil,
    PGSegModel,
    PGSegProcessor,
    Segmenter,
    default_tokenizer,
    load_segmenter,
)
from pgseg_hf.run_records import hash_of, model_record

# owner/name as the Hub allows them: no consecutive dots, nothing that could be a path.
_HUB_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_SIDE_FILES = (".json", ".txt")
# Weights in order of preference; `torch.load` reads the last one with `weights_only`.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_KEPT_MODELS = 3  # visitors' models kept in memory


class Catalogue:
    """Loads models by the names that visitors see. Offered models stay in memory, and so do the last Hub models that
    visitors used.

    Raises:
        ValueError: an offered model is not a checkpoint folder, a folder of checkpoints, or a name on the Hub.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.default = Path(DEFAULT_CHECKPOINT).name
        self._places = {self.default: DEFAULT_CHECKPOINT}
        for given in settings.models:
            for name, place in _offered(given).items():
                if self._places.setdefault(name, place) != place:
                    raise ValueError(f"two models are called {name}: {self._places[name]} and {place}.")
        self._loaded: dict[str, Segmenter] = {}  # the most recently used model is last
        self._digests: dict[str, str] = {}  # for all models loaded so far
        self._lock = threading.Lock()  # guards these, never held while a model is loaded
        # One lock per model: downloads do not block other models, and no model is loaded twice.
        self._loading: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    @property
    def names(self) -> list[str]:
        """Names of the offered models; the included one is first."""
        return list(self._places)

    def load(self, name: str) -> Segmenter:
        """Loads a model by its name in the catalogue or, if allowed, on the Hub.

        Raises:
            ValueError: the name is unknown, or the model cannot be loaded; the message has no paths of the server.
        """
        name = self.real_name(name)
        if name not in self._places:
            if not self.settings.any_hub_model:
                raise ValueError(f"{name!r} is not offered here; expected one of {', '.join(self.names)}.")
            if not _HUB_NAME.fullmatch(name):
                raise ValueError(
                    f"{name[:100]!r} is not a model; expected one of the list or a name on the Hub such as owner/name. "
                    "Folders are available if the server was started with --models FOLDER."
                )
        with self._lock:
            loading = self._loading.setdefault(name, threading.Lock())
        with loading:
            found = self._loaded.get(name) or self._load(name)
            with self._lock:
                self._loaded.pop(name, None)
                self._loaded[name] = found
                visitors = [each for each in self._loaded if each not in self._places]
                for each in visitors[:-_KEPT_MODELS]:
                    del self._loaded[each]
        return found

    def digest(self, name: str) -> str:
        """Hash of the weights and processor of a loaded model, since models on the Hub can change."""
        with self._lock:
            return self._digests[self.real_name(name)]

    def real_name(self, name: str) -> str:
        """The name of a model; the included one for an empty name."""
        return name.strip() or self.default

    def _load(self, name: str) -> Segmenter:
        # With ZeroGPU, a GPU is only available inside decorated functions.
        device = "cpu" if is_zerogpu() else self.settings.device
        with contextlib.ExitStack() as stack:
            place = self._places.get(name) or stack.enter_context(tempfile.TemporaryDirectory())
            try:
                if name not in self._places:
                    _download(name, place, self.settings.max_model_bytes)
                segmenter = load_any(place, device, getattr(torch, self.settings.dtype))
            except (ValueError, OSError, HfHubHTTPError, httpx.HTTPError) as error:
                reason = str(error).replace(place, "it").replace(str(Path(place).parent), "")
                raise ValueError(f"{name} cannot be loaded: {reason}") from error
        with self._lock:
            self._digests[name] = hash_of(model_record(segmenter))
        watch(segmenter.model)
        return segmenter


def load_any(place: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Segmenter:
    """Loads a PGSeg or GroupViT checkpoint. GroupViT is loaded as PGSeg without prototypes, with the same results, and
    always in float32.

    Raises:
        ValueError, OSError: the checkpoint is of neither kind, or incomplete.
    """
    config, _ = PreTrainedConfig.get_config_dict(place)
    if config.get("model_type") != "groupvit":
        return load_segmenter(place, device=device, dtype=dtype)
    model = PGSegModel.from_groupvit(place, npr_variant="none")
    tokenizer = default_tokenizer(model.config.text_config.max_position_embeddings)
    if model.config.text_config.vocab_size != len(tokenizer):
        raise ValueError(
            f"its vocabulary has {model.config.text_config.vocab_size} tokens; expected CLIP's {len(tokenizer)}."
        )
    return Segmenter(model.to(device), PGSegProcessor(PGSegImageProcessorPil(), tokenizer))


def _offered(given: str) -> dict[str, str]:
    """Paths or Hub names of the models of one entry of the settings, by name."""
    folder = Path(given).expanduser()
    if not folder.is_dir():
        if _HUB_NAME.fullmatch(given):
            return {given: given}
        raise ValueError(f"{given} is neither a folder nor a name on the Hub such as owner/name.")
    folder = folder.resolve()
    checkpoints = [folder] if (folder / "config.json").is_file() else sorted(folder.iterdir())
    found = {path.name: str(path) for path in checkpoints if (path / "config.json").is_file()}
    if not found:
        raise ValueError(f"{given} and its subfolders have no config.json; expected a checkpoint.")
    return found


def _download(name: str, folder: str, max_bytes: int) -> None:
    """Downloads a public model, without the owner's token and without files that could be executed."""
    files = {
        file.rfilename: file.size or 0
        for file in HfApi(token=False).model_info(name, files_metadata=True, timeout=10).siblings or ()
        if "/" not in file.rfilename
    }
    weights = next((file for file in _WEIGHTS if file in files), None)
    if weights is None:
        raise ValueError(f"it has neither {' nor '.join(_WEIGHTS)}.")
    wanted = [weights, *(file for file in files if file.endswith(_SIDE_FILES))]
    size = sum(files[file] for file in wanted)
    if size > max_bytes:
        raise ValueError(f"it has {size:,} bytes, more than the {max_bytes:,} that this server accepts.")
    snapshot_download(name, local_dir=folder, allow_patterns=wanted, token=False)
