"""Rate at which large images on a web server become 256-pixel shards: download.py beside img2dataset.

    python benchmarks/preprocess.py

Both get the same list of urls of 2.7-megapixel JPEGs from the same server on this machine, as many processes as there
are cores, and make webdataset tars of 256-pixel centre squares, JPEG quality 95. They run one after the other, round
after round, each as a whole program, starting included; a figure is the median over the rounds. img2dataset is
installed into an environment of its own. Writes benchmarks/results/preprocess.json.
"""

from __future__ import annotations

import argparse
import csv
import http.server
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

HEIGHT, WIDTH, QUALITY, SIZE = 1424, 1900, 90, 256
SMALLEST, LARGEST, LEAVES = 8.0, 600.0, 4000  # radii in pixels and number of the discs in an image
DISTINCT = 48  # images on the server; urls name them in turn
RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parents[1]
IMG2DATASET = ("img2dataset==1.47.0", "setuptools<81")


def main() -> None:
    """Make images and list, let both run in turn, write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--urls", type=int, default=1200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/preprocess"))
    parser.add_argument("--serve", type=Path, help="be the web server of this folder (used by the program itself)")
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    from environment import describe, peer

    from dalle_scale import log

    python = peer("img2dataset", *IMG2DATASET)
    shutil.rmtree(args.folder, ignore_errors=True)
    megabytes = draw(args.folder / "images")
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(args.folder / "images")], stdout=-1, text=True)
    assert server.stdout is not None
    write_list(args.folder / "list.csv", args.urls, port=int(server.stdout.readline()))
    commands = {"ours": ours(args.folder), "img2dataset": theirs(args.folder, str(python), args.urls)}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    try:
        for _ in log.progress(range(args.rounds), "measure", "rounds", args.rounds):
            for name, command in commands.items():
                seconds[name].append(once(command, args.folder / name, args.urls))
    finally:
        server.kill()
    result = {
        "urls": args.urls,
        "image": f"{WIDTH} x {HEIGHT}, {megabytes:.2f} MB",
        "rounds": args.rounds,
        "images_per_second": {name: round(args.urls / statistics.median(times), 1) for name, times in seconds.items()},
        "ours_over_img2dataset": round(
            statistics.median(a / b for a, b in zip(seconds["img2dataset"], seconds["ours"], strict=True)), 2
        ),
        "seconds": seconds,
        **describe(),
    }
    print(json.dumps(result, indent=1))
    (RESULTS / "preprocess.json").write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(args.folder)


def ours(folder: Path) -> list[str]:
    """download.py."""
    return [
        sys.executable,
        str(ROOT / "data_tools" / "download.py"),
        str(folder / "list.csv"),
        f"--out={folder / 'ours'}",
        f"--size={SIZE}",
        f"--workers={os.cpu_count()}",
        "--samples-per-shard=200",
        "--per-host=64",
        "--allow-private",
    ]


def theirs(folder: Path, python: str, urls: int) -> list[str]:
    """img2dataset as its README runs it, with the same sizes."""
    return [
        str(Path(python).with_name("img2dataset")),
        f"--url_list={folder / 'list.csv'}",
        "--input_format=csv",
        "--url_col=url",
        "--caption_col=caption",
        "--output_format=webdataset",
        f"--output_folder={folder / 'img2dataset'}",
        f"--processes_count={os.cpu_count()}",
        "--thread_count=32",
        f"--image_size={SIZE}",
        "--resize_mode=center_crop",
        "--encode_quality=95",
        "--number_sample_per_shard=200",
        "--enable_wandb=False",
    ]


def once(command: list[str], out: Path, urls: int) -> float:
    """Seconds of one whole run; all images must have come out of it."""
    shutil.rmtree(out, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    images = 0
    for path in out.rglob("*.tar"):
        with tarfile.open(path) as tar:
            images += sum(name.endswith(".jpg") for name in tar.getnames())
    assert images == urls, f"{command[0]}: {images} of {urls} images\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return seconds


def draw(folder: Path) -> float:
    """The images; returns their mean size in megabytes."""
    folder.mkdir(parents=True)
    sizes = []
    for number in range(DISTINCT):
        data = simplejpeg.encode_jpeg(dead_leaves(number), quality=QUALITY, colorsubsampling="420")
        (folder / f"{number}.jpg").write_bytes(data)
        sizes.append(len(data))
    return statistics.mean(sizes) / 1e6


def dead_leaves(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image [H, W, 3] of discs that hide each other, of all sizes alike (radii fall as r^-3), which has edges and
    a spectrum as photographs do (Lee, Mumford and Huang, 2001), and a camera's noise of two levels."""
    rng = np.random.default_rng(seed)
    radii = (SMALLEST**-2 - rng.random(LEAVES) * (SMALLEST**-2 - LARGEST**-2)) ** -0.5
    centres = rng.random((LEAVES, 2)) * (HEIGHT, WIDTH)
    colours = 255 * (0.6 * rng.random((LEAVES, 1)) + 0.4 * rng.random((LEAVES, 3)))
    pixels = np.zeros((HEIGHT, WIDTH, 3))
    for radius, (y, x), colour in zip(radii, centres, colours, strict=True):
        top, left = max(0, int(y - radius)), max(0, int(x - radius))
        part = pixels[top : int(y + radius) + 1, left : int(x + radius) + 1]
        rows, columns = np.ogrid[: part.shape[0], : part.shape[1]]
        part[(rows + top - y) ** 2 + (columns + left - x) ** 2 <= radius**2] = colour
    pixels += 2 * rng.standard_normal((HEIGHT, WIDTH, 1))
    return pixels.clip(0, 255).astype(np.uint8)


def write_list(path: Path, urls: int, port: int) -> None:
    """The list that both read."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["url", "caption"])
        rows.writerows(
            [f"http://127.0.0.1:{port}/{number % DISTINCT}.jpg?{number}", f"image number {number}"]
            for number in range(urls)
        )


def serve(folder: Path) -> None:
    """Serve the images from memory on a free port, which is printed."""
    files = {f"/{path.name}": path.read_bytes() for path in folder.iterdir()}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            data = files[self.path.partition("?")[0]]
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *unused: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 1024  # Python's 5 would make most of a crowd wait a second for a second try

    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
