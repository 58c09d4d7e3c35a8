"""`make train`: draw the sample when it is missing, then train, evaluate and detect on it."""

import shlex
import subprocess
import sys
from pathlib import Path

import torch

from engine.runlog import new_run_folder
from tools.make_sample_voc import make_sample
from utils.errors import UserError, run_script

SAMPLE = Path("VOCdevkit/Sample")
# Full YOLOv4 on a GPU; on two CPU cores a sixteenth of its channels' work ends within minutes.
ON_GPU = "--input_shape 416 416 --batch_size 16 --epochs 40"
ON_CPU = (
    "--width 0.25 --depth 0.34 --input_shape 192 192 --batch_size 8 --epochs 20 --num_workers 0 "
    "--cache"
)


def main() -> None:
    if not SAMPLE.exists():
        print(f"drawing {SAMPLE}")
        make_sample(SAMPLE, images=300, seed=0, difficulty="easy")
    folder = new_run_folder("")
    recipe = ON_GPU if torch.cuda.is_available() else ON_CPU
    run(
        f"train.py --train {SAMPLE}:train --val {SAMPLE}:val --classes_path {SAMPLE}/classes.txt "
        f"{recipe} --save_dir {folder}"
    )
    run(f"evaluate.py --weights {folder}/best.pt --data {SAMPLE}:val --save_dir {folder}/val")
    images = some_images(folder)
    run(f"predict.py --weights {folder}/best.pt --source {images} --save_dir {folder}/detections")
    print(f"\ncurves:     {folder}/loss.png, {folder}/map.png, {folder}/val/precision_recall.png")
    print(f"detections: {folder}/detections")


def run(command: str) -> None:
    """Print a command and run it with this Python; if it fails, exit with its status."""
    print(f"\n$ python {command}", flush=True)
    process = subprocess.Popen([sys.executable, *shlex.split(command)])
    try:
        status = process.wait()
    except KeyboardInterrupt:  # Ctrl-C reaches both: a training saves itself before it ends
        status = process.wait()
    if status != 0:
        sys.exit(status)


def some_images(folder: Path, count: int = 8) -> Path:
    """A folder with copies of the first validation images."""
    names = (SAMPLE / "ImageSets" / "Main" / "val.txt").read_text(encoding="utf-8").split()
    images = folder / "images"
    images.mkdir()
    for name in names[:count]:
        source = SAMPLE / "JPEGImages" / f"{name}.jpg"
        if not source.exists():
            raise UserError(f"{source} is missing. Delete {SAMPLE} and run `make train` again.")
        (images / source.name).write_bytes(source.read_bytes())
    return images


if __name__ == "__main__":
    run_script(main)
