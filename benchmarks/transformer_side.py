"""One side of transformer.py: "step" takes one training step of a text+image transformer on random tokens.

The command line has a JSON object: side, attention (kinds of the layers), samples.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dvae_side import declare_what_vqgan_needs
from side import quiet, serve
from torch import Tensor, nn

LAYERS, WIDTH, HEADS = 4, 256, 8
TEXT, GRID, WORDS, CODES = 256, 32, 16_384, 8192
KINDS = {"row": "axial_row", "column": "axial_col", "conv": "conv_like", "full": "full"}  # as DALLE-pytorch has them
Step = tuple[nn.Module, Callable[[], Tensor]]  # a net and its loss


def main() -> None:
    """Serve the side that the command line describes."""
    answers = quiet()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # in the environment of a peer
    asked = json.loads(sys.argv[1])
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, WORDS, (asked["samples"], TEXT), generator=generator)
    codes = torch.randint(CODES, (asked["samples"], GRID**2), generator=generator)
    torch.manual_seed(0)
    net, loss = {"ours": ours, "dalle-pytorch": dalle_pytorch, "gpt2": gpt2}[asked["side"]](asked, text, codes)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    serve(answers, net, {"step": step})


def ours(asked: dict[str, Any], text: Tensor, codes: Tensor) -> Step:
    """The loss of the stage `dalle`."""
    from dalle_scale.stages import dalle

    sizes = {"text_vocab": WORDS, "text_length": TEXT, "image_vocab": CODES, "grid": GRID}
    fields = {**sizes, "width": WIDTH, "layers": LAYERS, "heads": HEADS, "attention": asked["attention"]}
    stage = dalle.Stage(dalle.Stage.Config.model_validate_json(json.dumps(fields)))
    nets = stage.nets()
    batch = {"text": text, "codes": codes, "weight": torch.ones(len(text))}
    return nets["model"], lambda: stage.loss("model", nets, batch, 0).total


def dalle_pytorch(asked: dict[str, Any], text: Tensor, codes: Tensor) -> Step:
    """DALLE-pytorch with its defaults, but heads as wide as ours; its loss of codes."""
    declare_what_vqgan_needs()
    from dalle_pytorch import DALLE, DiscreteVAE

    vae = DiscreteVAE(image_size=8 * GRID, num_layers=3, num_tokens=CODES, codebook_dim=8, hidden_dim=8)
    kinds = tuple(KINDS[kind] for kind in asked["attention"])
    sizes = {"dim": WIDTH, "depth": LAYERS, "heads": HEADS, "dim_head": WIDTH // HEADS}
    net = DALLE(vae=vae, num_text_tokens=WORDS, text_seq_len=TEXT, attn_types=kinds, **sizes)
    net.vae = None  # takes no part and would be counted
    return net, lambda: net(text, codes, return_loss=True)


def gpt2(asked: dict[str, Any], text: Tensor, codes: Tensor) -> Step:
    """What one writes in a day: a GPT-2 of transformers over both vocabularies, dense, with PyTorch's attention."""
    from dalle_scale.nn.torchvision_compat import declare_missing_operators

    declare_missing_operators()
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": TEXT + GRID**2}
    without = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(vocab_size=WORDS + CODES, attn_implementation="sdpa", use_cache=False, **sizes, **without)
    net = GPT2LMHeadModel(config)
    tokens = torch.cat([text, codes + WORDS], dim=1)
    return net, lambda: net(input_ids=tokens, labels=tokens).loss


if __name__ == "__main__":
    main()
