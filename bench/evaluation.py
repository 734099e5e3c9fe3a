"""Time the evaluation of photographs, also against another checkout in alternation.

Each run is a process of its own: it segments generated JPEG photographs with a small network of random weights and compares them
with generated label maps. The first evaluation warms up, the second is timed. All runs must count the same confusion matrix.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: Size of the photographs, and how many of them.
SIZES = {"640x480": 32, "1280x960": 24, "2048x1024": 16}
CLASSES = 11


def make_photographs(root, width, height, count):
    """Write photographs and label maps of squares of 32 pixels as `data.name=folder` reads them."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        for split in ("train", "val"):
            (root / kind / split).mkdir(parents=True)
    for i in range(count):
        # Shapes with soft edges and some noise compress like photographs, to about 1.5 bits per pixel.
        small = Image.fromarray(rng.integers(0, 256, (height // 24, width // 24, 3), np.uint8))
        pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        pixels = (pixels + rng.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8)
        labels = np.kron(rng.integers(0, CLASSES, (height // 32, width // 32)), np.ones((32, 32))).astype(np.uint8)
        for split in ("train", "val") if i == 0 else ("val",):
            Image.fromarray(pixels).save(root / "images" / split / f"{i:02}.jpg", quality=90)
            Image.fromarray(labels).save(root / "labels" / split / f"{i:02}.png")


def measure(root, precision):
    """Images per second of one evaluation, and a digest of its confusion matrix. Uses the `flowseg` that is imported."""
    import torch

    from flowseg.build import build
    from flowseg.config import config_from_tree
    from flowseg.data import open_data
    from flowseg.inference.evaluate import evaluate
    from flowseg.runs.memory import keep_freed_memory
    from flowseg.segment import Segmenter, default_device

    classes = [f"class {k}" for k in range(CLASSES)]
    data = {"name": "folder", "root": root, "classes": classes, "height": 128, "width": 160, "check": "none"}
    config = config_from_tree({"data": data, "train": {"mixed_precision": precision}})
    keep_freed_memory()
    torch.manual_seed(0)
    model, codebook = build(config, CLASSES)
    with torch.no_grad():
        for value in model.parameters():
            # A new model has layers of zeros, which would make all labels equal.
            value.normal_(std=0.02) if not value.any() else None
    segmenter = Segmenter(model.eval(), codebook, config, default_device())
    pairs = open_data(config.data, seed=0).val
    evaluate(segmenter, pairs)
    start = time.perf_counter()
    scores = evaluate(segmenter, pairs)
    seconds = time.perf_counter() - start
    digest = hashlib.sha256(json.dumps(scores.confusion.tolist()).encode()).hexdigest()[:12]
    return {"images_per_second": scores.images / seconds, "confusion": digest}


def run(tree, root, precision):
    """Measure the checkout `tree` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--case", str(root), "--precision", precision]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="another checkout, with compiled kernels, to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="runs per checkout and size")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--precision", default="auto", choices=("auto", "no", "bf16"))
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.case:
        print(json.dumps(measure(given.case, given.precision)))
        return
    trees = {"this": Path(__file__).resolve().parents[1]}
    if given.against:
        trees["other"] = given.against.resolve()
    for size in given.sizes:
        with tempfile.TemporaryDirectory() as folder:
            make_photographs(Path(folder), *map(int, size.split("x")), SIZES[size])
            runs = {name: [] for name in trees}
            for _ in range(given.rounds):
                for name, tree in trees.items():
                    runs[name].append(run(tree, folder, given.precision))
        assert len({one["confusion"] for some in runs.values() for one in some}) == 1, runs
        speeds = {name: statistics.median(one["images_per_second"] for one in some) for name, some in runs.items()}
        text = f"{size}, {SIZES[size]} photographs: {speeds['this']:.1f} images/s"
        if given.against:
            text += f" against {speeds['other']:.1f} ({speeds['this'] / speeds['other']:.2f}x)"
        print(text, flush=True)


if __name__ == "__main__":
    main()
