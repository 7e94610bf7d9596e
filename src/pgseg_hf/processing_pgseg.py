"""Images, captions, class labels and tags to the inputs of PGSeg, and class names to embeddings."""

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
    """One processor for PGSeg's two inputs: an image processor and a CLIP tokenizer.

    Args:
        image_processor: a `PGSegImageProcessor` or `PGSegImageProcessorPil`.
        tokenizer: a `CLIPTokenizer`; text is padded to its `model_max_length` and truncated with the end
            token kept.
        templates: prompt templates for class labels, each with one `{}`, saved with the processor. By default
            the released segmentation prompt.
        window_size: side in pixels of the sliding window on a resized image, by default the released
            evaluation's; None for the whole image at once.
        window_stride: pixels from one window to the next.
        window_features: cut windows from the features that a backbone has of the whole image, not from its pixels; for
            models that were trained so. Size and stride are then multiples of the model's `patch_size`.
        top_k: number of labels that one window may show, by default the released evaluation's.
        patch_weight: share w of the patches' own scores in a pixel's, which are (1 - w) times those of its group
            plus w times those of the patches around it; 0, the released recipe, for the groups alone. Only for models
            with `contrastive_pooling="patches"`.
        vocabulary: words that the checkpoint was trained with. With a background threshold those that mean something
            else than the labels compete with them, so that even a single label need not cover the image.

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
        """Prepare images with captions or class labels.

        Args:
            images: one image or a list, see the image processor.
            text: one caption or a list, used as they are.
            labels: N class labels, put into the templates; not together with `text`.
            tags: for each image its own words (training with the multi-label loss), each put into the first
                template; an image may have none.
            kwargs: `templates=[...]` for this call's labels and tags instead of the processor's own, and the
                arguments of the tokenizer and the image processor (`return_tensors`, `size`, `max_length`,
                ...).

        Returns:
            A `BatchFeature` with what the inputs given need:
            - `pixel_values` [B, 3, H, W] for images;
            - `input_ids` and `attention_mask` [B, L] for text, [N, L] for labels with one template, [N, T, L]
              with T of them (the model averages their embeddings);
            - `tag_input_ids` and `tag_attention_mask` [B, M, L] for tags, M the largest number of tags of
              an image; rows beyond an image's own tags are padding with an attention mask of zeros.

        Raises:
            ValueError: without any input, for text and labels together, empty text, bad labels, tags or
                templates (see `validate_labels`), labels that are the same where they are cut, and tags that are
                not one list for each image or text.
        """
        templates = kwargs.pop("templates", None)
        if are_images(images):
            images = list(images)
        if is_list(text):
            text = list(text)
        self._check_inputs(images, text, labels, tags, templates)
        templates = self.templates if templates is None else validate_templates(templates)
        # On the right whatever the tokenizer's own setting, which would take precedence over `text_kwargs`.
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
                raise ValueError(f"tags are for {len(tags)} images, got {len(data['pixel_values'])} images")
            data.update(self._encode_tags(tags, templates[0], text_kwargs))
        return BatchFeature(data, tensor_type=return_tensors)

    @staticmethod
    def _check_inputs(images: Any, text: Any, labels: Any, tags: Any, templates: Any) -> None:
        """Refuse combinations of inputs that make no sense."""
        if images is None and text is None and labels is None and tags is None:
            raise ValueError("nothing to process: give images, text, labels or tags")
        if text is not None and labels is not None:
            raise ValueError(
                "give text (captions, used as they are) or labels (put into templates), not both"
            )
        if templates is not None and labels is None and tags is None:
            raise ValueError("templates are for labels and tags, and neither was given")
        if text is not None and not isinstance(text, str) and len(text) == 0:
            raise ValueError("text is an empty list: give at least one caption")
        if tags is not None:
            if not is_list(tags) or len(tags) == 0:
                raise ValueError(f"tags must be a list with one list of strings for each image, got {tags!r}")
            texts = [text] if isinstance(text, str) else text
            if texts is not None and len(texts) != len(tags):
                raise ValueError(f"tags are for {len(tags)} images, got {len(texts)} texts")

    def _encode_labels(
        self, labels: Sequence[str], templates: Sequence[str], text_kwargs: dict
    ) -> dict[str, list]:
        """Token ids and the like, [N][L] or [N][T][L] with several templates."""
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
        """As for every processor; a repository without a model card gets one that waits for the model's."""
        token, private = kwargs.get("token"), kwargs.get("private")
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not kwargs.get("create_pr") and not api.file_exists(repo_id, "README.md"):
            processor_card(repo_id).push_to_hub(repo_id, token=token)
        return super().push_to_hub(repo_id, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> Any:
        """As `ProcessorMixin.save_pretrained`."""
        # A tokenizer saves the truncation and padding of its last call, which loading would take for defaults.
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        # For the file only: a processor that was loaded does not have it, and the two should be equal.
        self.__dict__.pop("auto_map", None)
        return files

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> Any:
        """As `ProcessorMixin.from_pretrained`.

        Raises:
            OSError: files that are none, with the likely reason.
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
        """As `ProcessorMixin.get_processor_dict`; a folder without the processor's own file is refused.

        Raises:
            OSError: such a folder, whose other files do not tell templates, windows and the like.
        """
        fields, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "processor_class" not in fields:
            raise OSError(
                f"{pretrained_model_name_or_path} has no processor_config.json with a processor_class, expected what "
                "save_pretrained of a processor or pipeline writes; of a tokenizer and an image processor make one by "
                "PGSegProcessor(image_processor, tokenizer)."
            )
        return fields, kwargs

    def get_class_embeddings(
        self,
        model: PreTrainedModel,
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
        batch_size: int = 256,
    ) -> torch.Tensor:
        """Embed class labels: the mean over templates of the text features, then L2-normalised.

        This is the released recipe: the features are averaged as they leave the text head, not normalised one
        by one. All prompts pass the text tower, which in the released variant moves its buffer of text prototypes;
        [`Segmenter`] keeps what it was asked for.

        Args:
            model: a `PGSegModel` (anything with its `get_text_features`, `text_model` and `text_projection`),
                in evaluation mode.
            labels: N class labels.
            templates: instead of the processor's own.
            batch_size: prompts in one forward pass of the text tower.

        Returns:
            [N, D] unit rows, without gradient, on the model's device and in its features' dtype.

        Raises:
            ValueError: for bad labels or templates, labels that are the same where they are cut, a batch size
                below 1, or a model in training mode, whose BatchNorm would learn from the prompts.
        """
        batch_size = whole_number(batch_size, "batch_size")
        if model.training:
            raise ValueError("class embeddings need the model in evaluation mode: call model.eval() first")
        templates = self.templates if templates is None else validate_templates(templates)
        prompts = build_prompts(labels, templates)
        ids, mask = (part.unflatten(0, (-1, len(templates))) for part in self._tokens(labels, prompts))
        return _embed_prompts(model, ids, mask, batch_size)

    def _context(self, text_kwargs: dict) -> int:
        """Tokens that a text may have."""
        return text_kwargs.get("max_length") or self.tokenizer.model_max_length

    def _tokens(self, labels: Sequence[str], prompts: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask [N * T, L]. Other than padding by the tokenizer's call this leaves it, which
        threads may share, as it is."""
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
        """Label maps of whole images, by the released inference recipe.

        Args:
            outputs: of `PGSegModel` on B images and N labels.
            target_sizes: (height, width) for each image, usually of the original; the input's by default.
            background_threshold: where no label scores this much there is background; None for no background. Outputs
                know nothing of other words, so that `vocabulary` is not used here; [`Segmenter`] uses it.
            top_k: number of labels that one image may show; the processor's by default.
            patch_weight: of the patches' scores in a pixel's; the processor's by default.

        Returns:
            B tensors int64 [H, W]. Without a background, values index the labels; with one, 0 is background and
            label i has value i + 1.

        Raises:
            ValueError: target sizes for another number of images, a threshold or weight outside 0 to 1, or a weight of
                patches that the outputs do not have.
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
        """How sure the masks are: for each image and value of its label map the mean score of the pixels that have it.

        Args:
            outputs, background_threshold, top_k, patch_weight: as for `post_process_semantic_segmentation`.

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
        """Label map [H, W], its scores [H, W] and the number of values, for each image."""
        batch = len(outputs.grouping)
        top_k = self.top_k if top_k is None else top_k
        patch_weight = self.patch_weight if patch_weight is None else share(patch_weight, "patch_weight")
        patch_logits = getattr(outputs, "patch_logits", None)
        if patch_weight and patch_logits is None:
            raise ValueError(
                f"patch_weight is {patch_weight}, but the outputs have no patch_logits, which models with "
                "contrastive_pooling='patches' return without return_loss; expected 0"
            )
        if background_threshold is not None and outputs.segment_logits.shape[-1] == 1:
            logger.warning_once(
                f"background_threshold is {background_threshold} for outputs of a single label, which covers the whole "
                "image as nothing else is compared with it; Segmenter and the pipeline compare it with other words."
            )
        if target_sizes is not None and len(target_sizes) != batch:
            raise ValueError(f"target_sizes are for {len(target_sizes)} images, the outputs for {batch}")
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
    """Token ids and mask [N, T, L] to unit class embeddings [N, D]."""
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
