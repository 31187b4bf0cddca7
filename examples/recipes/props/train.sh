#!/bin/sh
# A model of 9.9 M parameters in three stages for props: data, training, export and evaluation.
# The assets (CC0) are files of public repositories, which the build downloads at the commits of
# shapes.csv and checks by their sha256. Where there is no network, FOLDER names a directory that
# holds them at the paths of the column "file". shapes.csv has one asset of each set of copies in
# assets.csv. Both state the split: families of groups and copies are held out, and no command
# trains on them. Every step is resumable: run the script again.
# MINUTES limits each training command, which then exits with 0 after a checkpoint.
set -eu
OUT=${OUT:-runs/props}
MINUTES=${MINUTES:-60}
PYTHON=${PYTHON:-.venv/bin/python}
HERE=$(dirname "$0")
DATA="$OUT/data"
SOURCE="github:$HERE/shapes.csv${FOLDER:+?folder=$FOLDER}"

$PYTHON -m pipeline.build --source "$SOURCE" --ids "$HERE/shapes.csv" --split-column split \
    --resolutions 256 --views 24 --image-size 128 --image-format webp --out "$DATA"
$PYTHON -m pipeline.verify "$DATA"
$PYTHON -m train.vae --preset props --data "$DATA" --out "$OUT/vae" --loop.max-minutes "$MINUTES"
$PYTHON -m train.encode --vae "$OUT/vae/latest" --data "$DATA" --quarter-turns
$PYTHON -m train.structure --preset props --data "$DATA" --out "$OUT/structure" \
    --vae.loop.max-minutes "$MINUTES" --flow.loop.max-minutes "$MINUTES"
$PYTHON -m train.dit --preset props --data "$DATA" --vae "$OUT/vae/latest" --out "$OUT/dit" \
    --flow.loop.max-minutes "$MINUTES"
$PYTHON -m train.export --vae "$OUT/vae/latest" --structure "$OUT/structure/flow/latest" \
    --dit "$OUT/dit/latest" --out "$OUT/export" --precision bf16 --steps 25 12 --guidance 3
$PYTHON -m train.evaluate vae --checkpoint "$OUT/export/vae_256" --data "$DATA" \
    --resolutions 256 --out "$OUT/evaluation/vae"
$PYTHON -m train.evaluate generation --checkpoint "$OUT/export" --data "$DATA" --split val \
    --seeds 0 1 2 --retrieval --held-out-views 4 --out "$OUT/evaluation/image"
$PYTHON -m train.evaluate generation --checkpoint "$OUT/export" --data "$DATA" --split val \
    --seeds 0 1 2 --cells stored --out "$OUT/evaluation/cells"
