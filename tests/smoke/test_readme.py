"""Every command of the README runs, as it stands there, on a few images; training commands get smaller by overrides
at their end."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from support.processes import HANG_SECONDS, free_port

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MODEL = "model.text_vocab=400 model.text_length=8 model.image_vocab=32 model.grid=4 model.image_size=32"
SMALLER = {  # program and config -> what makes it small
    "configs/dvae/paper_256.yaml": "steps=2 global_batch_size=8 engine.dtype=fp32 engine.micro_batch_size=4 "
    "model.image_size=32 model.vocab=32 model.n_hid=8 model.n_init=8 data.workers=0 log.valid_samples=4",
    "configs/dalle/small_256.yaml": "steps=2 global_batch_size=8 engine.dtype=fp32 model.width=32 model.layers=4 "
    f"model.heads=2 {MODEL} data.workers=0 log.valid_samples=4",
    "configs/clip/base_224.yaml": "steps=2 global_batch_size=8 engine.dtype=fp32 data.workers=0 log.valid_samples=4 "
    "model.image_size=32 model.patch=8 model.width=32 model.layers=1 model.heads=2 model.embed_dim=16 "
    "model.text_width=32 model.text_layers=1 model.text_heads=2 model.text_vocab=400 model.text_length=8",
}
REPLACED = {  # sizes that the small data set cannot have
    "--min-side 256": "--min-side 32",
    "--valid-share 0.02": "--valid-share 0.2",
    "--vocab 16384": "--vocab 320",
    "--candidates 64": "--candidates 4",
    "--keep 8": "--keep 2",
}


def commands() -> list[str]:
    """The lines of the README's code blocks."""
    blocks = README.split("```")[1::2]
    return [line for block in blocks for line in block.strip().splitlines()]


def test_make_targets():
    for line in commands()[:2]:
        target = line.split("#")[0].split()
        assert target[0] == "make"
        dry = subprocess.run([*target, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr


def test_own_images(tmp_path):
    for name in ("launch", "data_tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    (tmp_path / "my_images").mkdir()
    for index in range(40):
        colour = rng.integers(0, 256, 3, dtype=np.uint8)
        Image.fromarray(np.full((40, 40, 3), colour)).save(tmp_path / "my_images" / f"{index}.jpg")
        (tmp_path / "my_images" / f"{index}.txt").write_text(f"an image of colour {colour}")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    own_port = {"deepspeed ": f"deepspeed --master_port={free_port()} "}  # another job may have the default one
    ran = 0
    for line in commands()[2:]:
        for large, small in {**REPLACED, **own_port}.items():
            line = line.replace(large, small)
        line += next((f" {smaller}" for part, smaller in SMALLER.items() if part in line), "")
        done = subprocess.run(
            shlex.split(line), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        ran += 1
    assert ran == 10 and list((tmp_path / "runs/images/best/best").glob("*.png"))
