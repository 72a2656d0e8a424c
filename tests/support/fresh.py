"""What exports draw and bring back, as digests; run as a program it works where DeepSpeed cannot be imported.

python tests/fresh.py EXPORT[,EXPORT]...
"""

import hashlib
import json
import sys

import torch

IMAGES = 3


def digests(models: list[list[str]]) -> dict[str, str]:
    """Of each model (the exports that draw together): sha256 of its samples, and of a round trip of its tokenizer."""
    from dalle_scale.checkpoint import export
    from dalle_scale.sampling.sampler import Sampler

    found = {}
    for folders in models:
        opened = export.load(folders[0])
        if opened.stage.tokenizer(opened.nets) is not None:
            tokenizer = opened.stage.tokenizer(opened.nets)
            generator = torch.Generator().manual_seed(0)
            side = tokenizer.image_size
            images = torch.randint(256, (IMAGES, 3, side, side), generator=generator, dtype=torch.uint8)
            shown = tokenizer.decode(tokenizer.encode(images))
        else:
            [batch] = Sampler(folders).sample([""], IMAGES, seed=5)
            shown = batch.images
        found[",".join(folders)] = hashlib.sha256(shown.contiguous().numpy().tobytes()).hexdigest()
    return found


if __name__ == "__main__":
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    print(json.dumps(digests([argument.split(",") for argument in sys.argv[1:]])))
