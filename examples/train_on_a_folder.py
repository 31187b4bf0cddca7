"""Build data from a folder of meshes and train the SS-VAE on it, with the project's own commands.

python examples/train_on_a_folder.py MESHES OUT [STEPS]
"""

import subprocess
import sys
from pathlib import Path


def run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


def main(meshes: Path, out: Path, steps: int = 2000) -> None:
    data, vae = out / "data", out / "vae"
    run("pipeline.build", "--source", f"folder:{meshes}", "--resolutions", 64, "--out", data)
    run("pipeline.verify", data)
    options = ("--preset", "tiny", "--bricks.resolutions", 64, "--loop.steps", steps)
    run("train.vae", "--data", data, "--out", vae, *options)
    judged = ("--checkpoint", vae / "latest", "--data", data, "--resolutions", 64, "--split", "all")
    run("train.evaluate", "vae", *judged, "--out", out / "evaluation")
    print(f"open {out}/data/report/index.html and {out}/evaluation/index.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:4]))
