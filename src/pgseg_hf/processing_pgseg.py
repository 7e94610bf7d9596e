"""PGSeg's processor: inputs for the model, embeddings of class names, and label maps of its outputs."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import PreTrainedModel
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessorMixin, TextKwargs
from transformers.utils import logging

from .model_cards import processor_card
from .prompts import SEGMENTATION_TEMPLATES, build_prompts, validate_labels, validate_templates
from .scoring import TOP_K, WindowScores, best_labels, group_map, group_scores, merge_windows, patch_scores
from .tokenization import check_distinct_labels, warn_of_cut_texts
from .values import are_images, is_list, share, whole_number
from .weights import what_is_wrong_with

logger = logging.get_logger(__name__)


class PGSegProcessor(ProcessorMixin):
    """Combines a PGSeg image processor and a CLIP tokenizer.

    Args:
        image_processor: a `PGSegImageProcessor` or `PGSegImageProcessorPil`.
        tokenizer: a `CLIPTokenizer`. Texts are padded to its `model_max_length`; truncation keeps the end token.
        templates: prompt templates for class labels, each with one `{}`. Defaults to the released segmentation prompt.
        window_size: side in pixels of the sliding window on a resized image; None for the whole image at once.
        window_stride: step between windows in pixels. The defaults are those of the released evaluation.
        window_features: whether to cut windows from a backbone's features of the whole image instead of from its
            pixels, for models trained this way. Size and stride must then be multiples of `patch_size`.
        top_k: maximum number of labels per window. Defaults to the released evaluation's.
        patch_weight: weight w of patch scores. A pixel's score is (1 - w) times the score of its group plus w times
            that of the patches around it. The released recipe uses 0; other values require
            `contrastive_pooling="patches"`.
        vocabulary: words that the checkpoint was trained with. With a background threshold, those with another meaning
            than the labels compete with them, so that a single label need not cover the whole image.

    Raises:
        ValueError: for templates without exactly one `{}`, a weight outside 0 to 1, or a `top_k` below 1.
    """

    # Saved with its code, for trust_remote_code=True where this package is not installed.
    _auto_class = "AutoProcessor"
    text_kwargs: TextKwargs = {"padding": "max_length", "truncation": True}

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        templates: Sequence[str] = SEGMENTATION_TEMPLATES,
        window_size: int | None = 448,
        window_stride: int = 224,
        top_k: int = TOP_K,
        patch_weight: float = 0.0,
        vocabulary: Sequence[str] | None = None,
        window_features: bool = False,
    ) -> None:
        super().__init__(image_processor, tokenizer)
        self.top_k = whole_number(top_k, "top_k")
        self.patch_weight = share(patch_weight, "patch_weight")
        self.vocabulary = None if vocabulary is None else validate_labels(vocabulary)
        self.templates = validate_templates(templates)
        self.window_size = None if window_size is None else whole_number(window_size, "window_size")
        self.window_stride = whole_number(window_stride, "window_stride")
        self.window_features = window_features

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        labels: Sequence[str] | None = None,
        tags: Sequence[Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepares images with captions or class labels for the model.

        Args:
            images: one image or a list, see the image processor.
            text: one caption or a list, used as they are.
            labels: N class labels, which are put into the templates. Cannot be combined with `text`.
            tags: a list of words for each image, possibly empty, for the multi-label loss; put into the first template.
            kwargs: `templates=[...]` to replace the processor's templates for labels and tags, and arguments of the
                tokenizer and the image processor (`return_tensors`, `size`, `max_length`, ...).

        Returns:
            A `BatchFeature` with the fields for the given inputs:
            - `pixel_values` [B, 3, H, W] for images.
            - `input_ids` and `attention_mask`: [B, L] for text, [N, L] for labels with one template, [N, T, L] for
              labels with T templates (the model averages their embeddings).
            - `tag_input_ids` and `tag_attention_mask` [B, M, L] for tags. M is the largest number of tags of an image;
              missing tags are padding with an attention mask of zeros.

        Raises:
            ValueError: if inputs are missing, empty, invalid (see `validate_labels`) or do not fit together, or if
                labels are equal after truncation.
        """
        templates = kwargs.pop("templates", None)
        if are_images(images):
            images = list(images)
        if is_list(text):
            text = list(text)
        self._check_inputs(images, text, labels, tags, templates)
        templates = self.templates if templates is None else validate_templates(templates)
        # Always pad on the right: the tokenizer's own setting would take precedence over `text_kwargs`.
        if "padding_side" not in kwargs.get("text_kwargs", {}):
            kwargs.setdefault("padding_side", "right")
        merged_kwargs = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs = merged_kwargs["text_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)

        data: dict[str, Any] = {}
        if images is not None or text is not None:
            data.update(super().__call__(images=images, text=text, **kwargs))
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            warn_of_cut_texts(self.tokenizer(texts, **text_kwargs), texts, self._context(text_kwargs))
        if labels is not None:
            data.update(self._encode_labels(labels, templates, text_kwargs))
        if tags is not None:
            if images is not None and len(data["pixel_values"]) != len(tags):
                raise ValueError(f"got tags for {len(tags)} images, but {len(data['pixel_values'])} images")
            data.update(self._encode_tags(tags, templates[0], text_kwargs))
        return BatchFeature(data, tensor_type=return_tensors)

    @staticmethod
    def _check_inputs(images: Any, text: Any, labels: Any, tags: Any, templates: Any) -> None:
        if images is None and text is None and labels is None and tags is None:
            raise ValueError("nothing to process: give images, text, labels or tags")
        if text is not None and labels is not None:
            raise ValueError(
                "give text (captions, used as they are) or labels (put into templates), not both"
            )
        if templates is not None and labels is None and tags is None:
            raise ValueError("templates apply to labels and tags, but neither was given")
        if text is not None and not isinstance(text, str) and len(text) == 0:
            raise ValueError("text is an empty list: give at least one caption")
        if tags is not None:
            if not is_list(tags) or len(tags) == 0:
                raise ValueError(f"tags must be a list with one list of strings for each image, got {tags!r}")
            texts = [text] if isinstance(text, str) else text
            if texts is not None and len(texts) != len(tags):
                raise ValueError(f"got tags for {len(tags)} images, but {len(texts)} texts")

    def _encode_labels(
        self, labels: Sequence[str], templates: Sequence[str], text_kwargs: dict
    ) -> dict[str, list]:
        """Tokenizer outputs as lists [N][L], or [N][T][L] for several templates."""
        prompts = build_prompts(labels, templates)
        encoded = self.tokenizer([prompt for of_label in prompts for prompt in of_label], **text_kwargs)
        check_distinct_labels(encoded, labels, prompts, self._context(text_kwargs))
        count = len(templates)
        if count == 1:
            return dict(encoded)
        return {
            key: [rows[i : i + count] for i in range(0, len(rows), count)] for key, rows in encoded.items()
        }

    def _encode_tags(
        self, tags: Sequence[Sequence[str]], template: str, text_kwargs: dict
    ) -> dict[str, list]:
        """`tag_input_ids` and `tag_attention_mask`, [B][M][L]."""
        prompts = []
        for index, of_image in enumerate(tags):
            try:
                has_none = is_list(of_image) and len(of_image) == 0
                prompts.append([] if has_none else build_prompts(of_image, [template]))
            except ValueError as error:
                raise ValueError(f"tags of image {index}: {error}") from error
        flat = [prompt for of_image in prompts for (prompt,) in of_image]

        text_kwargs = {**text_kwargs, "padding": text_kwargs.get("padding") or "longest"}
        encoded = self.tokenizer(flat or [""], return_attention_mask=True, **text_kwargs)
        warn_of_cut_texts(encoded, flat, self._context(text_kwargs))
        length = len(encoded["input_ids"][0])
        most = max(1, *(len(of_image) for of_image in prompts))
        batch: dict[str, list] = {}
        for name, filler in (("input_ids", self.tokenizer.pad_token_id), ("attention_mask", 0)):
            rows = iter(encoded[name])
            batch[f"tag_{name}"] = [
                [next(rows) for _ in of_image] + [[filler] * length] * (most - len(of_image))
                for of_image in prompts
            ]
        return batch

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Pushes the processor. A repository without a model card gets a placeholder."""
        token, private = kwargs.get("token"), kwargs.get("private")
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not kwargs.get("create_pr") and not api.file_exists(repo_id, "README.md"):
            processor_card(repo_id).push_to_hub(repo_id, token=token)
        return super().push_to_hub(repo_id, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> Any:
        """Saves the processor, see `ProcessorMixin.save_pretrained`."""
        # A tokenizer saves the truncation and padding of its last call, which would become defaults on loading.
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        # Only needed in the file. A loaded processor does not have it, and the two should be equal.
        self.__dict__.pop("auto_map", None)
        return files

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> Any:
        """Loads a processor, see `ProcessorMixin.from_pretrained`.

        Raises:
            OSError: if a file is invalid, with the likely reason.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:
            if (reason := what_is_wrong_with(pretrained_model_name_or_path)) is None:
                raise
            raise OSError(reason) from error

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """See `ProcessorMixin.get_processor_dict`.

        Raises:
            OSError: if a folder lacks the processor's own file; the others do not have templates, windows and so on.
        """
        fields, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "processor_class" not in fields:
            raise OSError(
                f"{pretrained_model_name_or_path} has no processor_config.json with a processor_class, expected a "
                "folder saved by save_pretrained of a processor or pipeline. To make one, "
                "use PGSegProcessor(image_processor, tokenizer).save_pretrained(folder)."
            )
        return fields, kwargs

    def get_class_embeddings(
        self,
        model: PreTrainedModel,
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
        batch_size: int = 256,
    ) -> torch.Tensor:
        """Embeds class labels: the mean of the text features over templates, then L2-normalised.

        As in the released recipe, the features that are averaged are not normalised. All prompts pass through the text
        tower, which in the released variant updates its text prototypes. [`Segmenter`] caches embeddings.

        Args:
            model: a `PGSegModel`, or a model with its `get_text_features` and `text_model`, in evaluation mode.
            labels: N class labels.
            templates: replaces the processor's templates.
            batch_size: number of prompts per forward pass of the text tower.

        Returns:
            Unit vectors [N, D], without gradient, on the model's device and in its features' dtype.

        Raises:
            ValueError: if labels or templates are invalid, labels are equal after truncation, the batch size is below
                1, or the model is in training mode, in which BatchNorm would learn from the prompts.
        """
        batch_size = whole_number(batch_size, "batch_size")
        if model.training:
            raise ValueError("class embeddings require the model in evaluation mode: call model.eval() first")
        templates = self.templates if templates is None else validate_templates(templates)
        prompts = build_prompts(labels, templates)
        ids, mask = (part.unflatten(0, (-1, len(templates))) for part in self._tokens(labels, prompts))
        return _embed_prompts(model, ids, mask, batch_size)

    def _context(self, text_kwargs: dict) -> int:
        """Maximum number of tokens of a text."""
        return text_kwargs.get("max_length") or self.tokenizer.model_max_length

    def _tokens(self, labels: Sequence[str], prompts: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask [N * T, L]. Padding is a separate step, because threads may share the
        tokenizer."""
        text_kwargs: dict = {**self.text_kwargs, "padding": False}
        encoded = self.tokenizer([prompt for of_label in prompts for prompt in of_label], **text_kwargs)
        check_distinct_labels(encoded, labels, prompts, self._context(text_kwargs))
        rows = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        padding = {
            name: self.text_kwargs[name] for name in ("padding", "max_length") if name in self.text_kwargs
        }
        padded = self.tokenizer.pad(rows, return_tensors="pt", padding_side="right", **padding)
        return padded["input_ids"], padded["attention_mask"]

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        background_threshold: float | None = None,
        top_k: int | None = None,
        patch_weight: float | None = None,
    ) -> list[torch.Tensor]:
        """Converts outputs for whole images to label maps, by the released inference recipe.

        Args:
            outputs: output of `PGSegModel` for B images and N labels.
            target_sizes: (height, width) of each label map, usually the original's. Defaults to the input's.
            background_threshold: pixels whose best score is below it are background; None for no background.
                `vocabulary` is not used here, because outputs hold no other words; [`Segmenter`] uses it.
            top_k: maximum number of labels per image. Defaults to the processor's.
            patch_weight: weight of patch scores. Defaults to the processor's.

        Returns:
            B tensors int64 [H, W]. Values index the labels; with a background, 0 is background and label i is i + 1.

        Raises:
            ValueError: if the number of target sizes is not the number of images, a threshold or weight is outside 0 to
                1, or `patch_weight` is above 0 and the outputs have no patch logits.
        """
        how = (background_threshold, top_k, patch_weight)
        return [labels for labels, _, _ in self._label_maps(outputs, target_sizes, *how)]

    def get_label_scores(
        self,
        outputs: Any,
        background_threshold: float | None = None,
        top_k: int | None = None,
        patch_weight: float | None = None,
    ) -> torch.Tensor:
        """Confidence of the masks: the mean score of each label's pixels in each image.

        Args:
            outputs, background_threshold, top_k, patch_weight: see `post_process_semantic_segmentation`.

        Returns:
            [B, N], or [B, 1 + N] with the background first; 0 for labels without pixels.
        """
        rows = []
        for labels, scores, count in self._label_maps(
            outputs, None, background_threshold, top_k, patch_weight
        ):
            totals = scores.new_zeros(count).scatter_add_(0, labels.flatten(), scores.flatten())
            rows.append(totals / labels.flatten().bincount(minlength=count).clamp(min=1))
        return torch.stack(rows)

    def _label_maps(
        self,
        outputs: Any,
        target_sizes: Any,
        background_threshold: float | None,
        top_k: int | None,
        patch_weight: float | None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Yields the label map [H, W], its scores [H, W] and the number of values for each image."""
        batch = len(outputs.grouping)
        top_k = self.top_k if top_k is None else top_k
        patch_weight = self.patch_weight if patch_weight is None else share(patch_weight, "patch_weight")
        patch_logits = getattr(outputs, "patch_logits", None)
        if patch_weight and patch_logits is None:
            raise ValueError(
                f"patch_weight is {patch_weight}, but the outputs have no patch_logits, expected 0. Models with "
                "contrastive_pooling='patches' return patch_logits without return_loss"
            )
        if background_threshold is not None and outputs.segment_logits.shape[-1] == 1:
            logger.warning_once(
                f"background_threshold is {background_threshold}, but the outputs are of a single label, which covers "
                "the whole image; Segmenter and the pipeline compare it with other words."
            )
        if target_sizes is not None and len(target_sizes) != batch:
            raise ValueError(f"got target_sizes for {len(target_sizes)} images, but outputs for {batch}")
        if target_sizes is not None and any(min(int(side) for side in size) < 1 for size in target_sizes):
            raise ValueError(
                f"target_sizes are {target_sizes}, expected (height, width) of at least 1 pixel each"
            )
        for index in range(batch):
            height, width = (int(side) for side in outputs.image_sizes[index])
            size = (height, width)
            how = (outputs.logits_per_image[index], background_threshold, top_k)
            window = WindowScores(
                group_map(outputs.grouping[index], size),
                group_scores(outputs.segment_logits[index], *how),
                patch_scores=None if patch_logits is None else patch_scores(patch_logits[index], *how),
                patch_weight=patch_weight,
            )
            scores, channels, count = merge_windows([window], size)
            target = (
                None if target_sizes is None else (int(target_sizes[index][0]), int(target_sizes[index][1]))
            )
            yield *best_labels(scores, channels, count, target), count


def _embed_prompts(model: Any, ids: torch.Tensor, mask: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Unit class embeddings [N, D] of token ids and mask [N, T, L]."""
    device = next(model.text_model.parameters()).device
    labels, templates, _ = ids.shape
    features = []
    with torch.no_grad():
        for some_ids, some_mask in zip(
            ids.flatten(0, 1).split(batch_size), mask.flatten(0, 1).split(batch_size)
        ):
            output = model.get_text_features(
                input_ids=some_ids.to(device), attention_mask=some_mask.to(device)
            )
            features.append(output.pooler_output)
        joined = torch.cat(features)
        wide = joined.float() if joined.dtype in (torch.float16, torch.bfloat16) else joined
        mean = wide.view(labels, templates, -1).mean(dim=1)
        return torch.nn.functional.normalize(mean, dim=-1).to(joined.dtype)


__all__ = ["PGSegProcessor"]
