"""Measures how close a text tower is to its sentence encoder, on a fixed set of words."""

from collections.abc import Sequence

import torch
from scipy.stats import spearmanr
from text_tower_models import Student, Teacher, space_map
from text_tower_texts import EVERYDAY, SYNONYMS, TextBank
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize


def measure(
    student: Student, teacher: Teacher, bank: TextBank, fold: str, shrinkage: float
) -> dict[str, float]:
    """Measures how close the tower is to its teacher on held-out and everyday nouns. If the tower has a `fold`, the
    teacher's embeddings are mapped in the same way with their own statistics."""
    everyday = teacher.embed_labels(bank.everyday)
    mean, matrix = torch.zeros(teacher.size), torch.eye(teacher.size)
    if fold != "none":
        mean, matrix = space_map(everyday, fold, shrinkage)

    def both(labels: Sequence[str]) -> tuple[Tensor, Tensor]:
        theirs = (teacher.embed_labels(labels) - mean) @ matrix.T
        return normalize(student.embed(labels), dim=-1), normalize(theirs, dim=-1)

    ours, theirs = both(bank.held_out)
    result = {"cosine, held-out nouns": cosine_similarity(ours, theirs).mean().item()}
    found = (ours @ theirs.T).argmax(1) == torch.arange(len(ours))
    result["held-out nouns nearest to their own target"] = found.float().mean().item()
    ours, theirs = both(bank.everyday)
    result["cosine, everyday nouns"] = cosine_similarity(ours, theirs).mean().item()
    one, other = torch.randint(len(ours), (2, 20_000), generator=torch.Generator().manual_seed(0))
    differ = one != other
    similarities = [(embeds[one] * embeds[other]).sum(-1)[differ] for embeds in (ours, theirs)]
    result["rank correlation of similarities, everyday nouns"] = float(spearmanr(*similarities).statistic)
    queries = both([word for word, _ in SYNONYMS])
    for name, embeds, names in zip(("student", "teacher"), queries, both(EVERYDAY)):
        ranks = synonym_ranks(embeds, names)
        result[f"{name}: mean rank of the synonym among {len(EVERYDAY)}"] = ranks.mean().item()
        result[f"{name}: synonyms that are nearest"] = (ranks == 1).float().mean().item()
    return result


def synonym_ranks(queries: Tensor, names: Tensor) -> Tensor:
    """Ranks [pairs] of the second words of `SYNONYMS` among the everyday names, by similarity to the first words. Both
    inputs are normalised embeddings [., D]."""
    similarities = queries @ names.T
    for row, (word, _) in enumerate(SYNONYMS):
        if word in EVERYDAY:
            similarities[row, EVERYDAY.index(word)] = -2
    right = similarities[range(len(SYNONYMS)), [EVERYDAY.index(partner) for _, partner in SYNONYMS]]
    return 1.0 + (similarities > right[:, None]).sum(1)


def print_table(title: str, figures: dict[str, float]) -> None:
    """Prints figures as a Markdown table."""
    rows = [f"| {name} | {value:.3f} |" for name, value in figures.items()]
    print("\n".join(["", f"| {title} | |", "|---|---|", *rows, ""]), flush=True)
