"""Makes this folder's recordings from the full ones: `python trim.py FOLDER_OF_FULL_RECORDINGS`.

Keeps the tests' data small: maps that nothing uses are left out, of the gradients and the float64 recordings every n-th
entry of a tensor's `flatten` is kept, of predictions the label map (`.labels`, the argmax) and some of the scores.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
UNUSED = ("attn_map_0", "attn_map_1", "attn.hard", "ori_center_for_text")
GRADIENT_ENTRIES = 512
FLOAT64_ENTRIES = 256
WHOLE_PREDICTIONS = ("48x64.pred.bg1.t0.2", "68x50.pred.bg0.t0.95", "slide.bg1.t0.2.logits")


def some_entries(tensor: torch.Tensor, at_most: int) -> torch.Tensor:
    """Every n-th entry of the flattened tensor, where it has more than `at_most`; else the tensor as it is."""
    step = math.ceil(tensor.numel() / at_most)
    return tensor if step == 1 else tensor.flatten()[::step].clone()


def trim(source: Path) -> None:
    for name in ("state_dict", "inputs", "train_nogumbel", "train_gumbel_seed1234"):
        shutil.copyfile(
            source / f"released_tiny_{name}.safetensors", HERE / f"released_tiny_{name}.safetensors"
        )
    shutil.copyfile(source / "released_full_keys.json", HERE / "released_full_keys.json")
    for name in ("eval", "eval_f64", "slide", "train_nogumbel_f64", "grads_nogumbel"):
        kept = {}
        for key, tensor in load_file(source / f"released_tiny_{name}.safetensors").items():
            if key.endswith(UNUSED):
                continue
            if ".pred." in key or key.startswith("slide."):
                kept[f"{key}.labels"] = tensor.argmax(1).to(torch.uint8)
                if key not in WHOLE_PREDICTIONS:
                    continue
            if name.endswith("_f64") and not key.startswith("match"):
                kept[key] = some_entries(tensor, FLOAT64_ENTRIES)
            elif name.startswith("grads"):
                kept[key] = some_entries(tensor, GRADIENT_ENTRIES)
            else:
                kept[key] = tensor
        save_file(kept, HERE / f"released_tiny_{name}.safetensors")
    recorded = json.loads((source / "released_tiny.json").read_text())
    largest = {
        key: tensor.abs().max().item()
        for key, tensor in load_file(source / "released_tiny_grads_nogumbel.safetensors").items()
    }
    summary = {
        "largest_gradient_nogumbel": largest,
        **{name: norms for name, norms in recorded.items() if name.startswith("grad_norm_")},
    }
    (HERE / "released_tiny.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    trim(Path(sys.argv[1]))
