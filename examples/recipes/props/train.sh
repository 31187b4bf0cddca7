#!/bin/sh
# A model of 9.9 M parameters in three stages for props: data, training, export and evaluation.
# FOLDER holds the files of assets.csv (CC0), at the paths of its column "file". shapes.csv has one
# asset of each set of copies. Both state the split: families of groups and copies are held out, and
# no command trains on them. Every step is resumable: run the script again.
# MINUTES limits each training command, which then exits with 0 after a checkpoint.
set -eu
FOLDER=${FOLDER:?name the folder of the assets}
OUT=${OUT:-runs/props}
MINUTES=${MINUTES:-60}
PYTHON=${PYTHON:-.venv/bin/python}
HERE=$(dirname "$0")
DATA="$OUT/data"

$PYTHON -m pipeline.build --source "folder:$FOLDER" --ids "$HERE/shapes.csv" --split-column split \
    --resolutions 256 --views 24 --image-size 128 --image-format webp --out "$DATA"
$PYTHON -m pipeline.verify "$DATA"
$PYTHON -m train.vae --preset props --data "$DATA" --out "$OUT/vae" --loop.max-minutes "$MINUTES"
$PYTHON -m train.encode --vae "$OUT/vae/latest" --data "$DATA" --quarter-turns
$PYTHON -m train.structure --preset props --data "$DATA" --out "$OUT/structure" \
    --vae.loop.max-minutes "$MINUTES" --flow.loop.max-minutes "$MINUTES"
$PYTHON -m train.dit --preset props --data "$DATA" --vae "$OUT/vae/latest" --out "$OUT/dit" \
    --flow.loop.max-minutes "$MINUTES"
$PYTHON -m train.export --vae "$OUT/vae/latest" --structure "$OUT/structure/flow/latest" \
    --dit "$OUT/dit/latest" --out "$OUT/export" --steps 25 12 --guidance 3
$PYTHON -m train.evaluate vae --checkpoint "$OUT/vae/latest" --data "$DATA"
$PYTHON -m train.evaluate generation --checkpoint "$OUT/export" --data "$DATA" --split val
