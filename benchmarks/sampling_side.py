"""One side of sampling.py: samples the codes of images for one caption, with random weights.

The command line has a JSON object: side, candidates. "sample" samples all codes; of DALLE-pytorch, which takes hours,
there is "sample N" instead: code N alone, after N others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from side import quiet, serve
from torch import Tensor, nn
from transformer_side import CODES, GRID, TEXT, WORDS, dalle_pytorch, gpt2, ours

KINDS = ["row", "column", "row", "conv"]
PLACES = (0, 255, 511, 767, 1023)  # codes that DALLE-pytorch samples


def main() -> None:
    """Serve the side that the command line describes."""
    answers = quiet()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # in the environment of a peer
    asked = json.loads(sys.argv[1])
    text = torch.randint(1, WORDS, (1, TEXT), generator=torch.Generator().manual_seed(0)).repeat(asked["candidates"], 1)
    torch.manual_seed(0)
    net, actions = {"ours": draw_ours, "dalle-pytorch": draw_dalle_pytorch}.get(asked["side"], draw_gpt2)(asked, text)
    with torch.inference_mode():
        serve(answers, net.eval(), actions)


def draw_ours(asked: dict[str, Any], text: Tensor) -> tuple[nn.Module, dict[str, Callable[[], Any]]]:
    """The stage's own."""
    from dalle_scale.stages import dalle

    sizes = {"text_vocab": WORDS, "text_length": TEXT, "image_vocab": CODES, "grid": GRID}
    net, _ = ours({"attention": KINDS}, text, text)
    fields = {**sizes, "width": 256, "layers": len(KINDS), "heads": 8, "attention": KINDS}
    stage = dalle.Stage(dalle.Stage.Config.model_validate_json(json.dumps(fields)))
    net.store_by_columns()  # type: ignore[operator]  # as the program does when it has loaded a model
    return net, {"sample": lambda: stage.sample({"model": net}, text, torch.arange(len(text)))}


def draw_gpt2(asked: dict[str, Any], text: Tensor) -> tuple[nn.Module, dict[str, Callable[[], Any]]]:
    """transformers' generate with keys and values that grow by concatenation, as in minDALL-E, or in static memory."""
    net, _ = gpt2({}, text, text.new_zeros(len(text), GRID**2))
    net.generation_config.update(eos_token_id=None, pad_token_id=0)  # type: ignore[operator,union-attr]
    rules = {"do_sample": True, "top_k": 0, "min_new_tokens": GRID**2, "max_new_tokens": GRID**2, "use_cache": True}
    if asked["side"] == "static cache":
        rules["cache_implementation"] = "static"
    mask = torch.ones_like(text)
    return net, {"sample": lambda: net.generate(text, attention_mask=mask, **rules)}  # type: ignore[operator]


def draw_dalle_pytorch(asked: dict[str, Any], text: Tensor) -> tuple[nn.Module, dict[str, Callable[[], Any]]]:
    """A forward pass over all that is there for every code, as its generate_images does without guidance."""
    net, _ = dalle_pytorch({"attention": KINDS}, text, text)
    codes = torch.randint(CODES, (len(text), GRID**2), generator=torch.Generator().manual_seed(0))

    def draw(place: int) -> None:
        logits = net(text, codes[:, :place])[:, -1]
        kept = logits.topk(logits.shape[1] // 2)  # its filter_thres of 0.5
        kept.indices.gather(1, kept.values.softmax(-1).multinomial(1))

    return net, {f"sample {place}": lambda place=place: draw(place) for place in PLACES}  # type: ignore[misc]


if __name__ == "__main__":
    main()
