"""Registers PGSeg with Transformers' Auto classes and pipelines without importing it.

Transformers lists its own models by name and looks a name up in the module `transformers.models.<model type>` when it
is needed. PGSeg's names are added to these lists, and this package, which imports its names on access, is registered as
those modules. The lists are in modules that import torch. They are not imported here, but extended when they are.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CONFIGS = {
    "pgseg": "PGSegConfig",
    "pgseg_text_model": "PGSegTextConfig",
    "pgseg_vision_model": "PGSegVisionConfig",
    "efficientnet_lite": "EfficientNetLiteConfig",
}
_MODELS = {
    "pgseg": "PGSegModel",
    "pgseg_text_model": "PGSegTextModel",
    "pgseg_vision_model": "PGSegVisionModel",
}
_IMAGE_PROCESSORS = {"pil": "PGSegImageProcessorPil", "torchvision": "PGSegImageProcessor"}

_AUTO = "transformers.models.auto"
_PIPELINES = "transformers.pipelines"
# The mappings of each module, without the suffix `_NAMES` of their lists, and the names to add.
_LISTS: dict[str, dict[str, dict[str, Any]]] = {
    f"{_AUTO}.configuration_auto": {"CONFIG_MAPPING": _CONFIGS},
    f"{_AUTO}.modeling_auto": {
        "MODEL_MAPPING": _MODELS,
        "MODEL_FOR_TEXT_ENCODING_MAPPING": {"pgseg": "PGSegTextModelWithProjection"},
        "MODEL_FOR_BACKBONE_MAPPING": {"efficientnet_lite": "EfficientNetLiteBackbone"},
    },
    f"{_AUTO}.processing_auto": {"PROCESSOR_MAPPING": {"pgseg": "PGSegProcessor"}},
    f"{_AUTO}.image_processing_auto": {"IMAGE_PROCESSOR_MAPPING": {"pgseg": _IMAGE_PROCESSORS}},
    _PIPELINES: {},
}


def register(package: ModuleType) -> None:
    """Adds a package's names to lists that are already imported now, and to the others when they are imported."""
    for model_type in _CONFIGS:
        sys.modules.setdefault(f"transformers.models.{model_type}", package)
    for name in _LISTS:
        # A module that is still being imported does not have its lists yet.
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _add_names(module)
    sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Finds Transformers' list modules like the other finders do, and adds the missing names after their import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _LISTS:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _AfterImport))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _add_names(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _add_names(module: ModuleType) -> None:
    for mapping, names in _LISTS[module.__name__].items():
        getattr(module, f"{mapping}_NAMES").update(names)
        # The mapping was built from the configurations' list, perhaps before PGSeg's names were added.
        getattr(getattr(module, mapping), "_reverse_config_mapping", {}).update(
            {config: model_type for model_type, config in _CONFIGS.items()}
        )
    if module.__name__ == _PIPELINES:
        # Like `register_pipeline`, but with the class by name, as for transformers' own pipelines.
        impl = f"{__package__}.pipeline.OpenVocabularySegmentationPipeline"
        default = {"model": (sys.modules[__package__].DEFAULT_CHECKPOINT, "main")}
        task = {"impl": impl, "pt": (module.AutoModel,), "default": default, "type": "multimodal"}
        module.PIPELINE_REGISTRY.supported_tasks.setdefault("open-vocabulary-segmentation", task)
