#!/bin/sh
# The whole chain on a laptop without a GPU, with the embedded shapes. Every step is resumable.
# `make demo` does the same in ten minutes, with more shapes and one report page.
set -eu
OUT=${OUT:-runs/laptop}
STEPS=${STEPS:-500}
PYTHON=${PYTHON:-.venv/bin/python}
DATA="$OUT/data"
common="--data $DATA --device cpu"

$PYTHON -m pipeline.build --preset smoke --limit 12 --resolutions 64 --out "$DATA"
$PYTHON -m pipeline.verify "$DATA"
$PYTHON -m train.vae --preset tiny $common --bricks.resolutions 64 --out "$OUT/vae" --loop.steps "$STEPS"
$PYTHON -m train.encode $common --vae "$OUT/vae/latest" --latents "$OUT/latents" --resolutions 64
$PYTHON -m train.dit --preset tiny $common --vae "$OUT/vae/latest" --latents "$OUT/latents" --resolution 64 --out "$OUT/dit" --flow.loop.steps "$STEPS"
$PYTHON -m train.structure --preset tiny $common --resolution 64 --out "$OUT/structure" --vae.loop.steps "$STEPS" --flow.loop.steps "$STEPS"
$PYTHON -m train.export --vae "$OUT/vae/latest" --structure "$OUT/structure/flow/latest" --dit "$OUT/dit/latest" --out "$OUT/export"
echo "generate with: $PYTHON -m model.generate IMAGE --checkpoint $OUT/export -o mesh.glb"
