#!/bin/sh
# What several views of an object gain: the model of train.sh is tuned for STEPS steps with one view
# of each sample and with up to VIEWS views, and both are evaluated on the held-out assets with one
# view and with VIEWS views. Run train.sh with the same OUT before. The results are the files
# evaluation.json below OUT/views-1 and OUT/views-VIEWS. Every step is resumable.
set -eu
OUT=${OUT:-runs/props}
VIEWS=${VIEWS:-4}
STEPS=${STEPS:-2000}
PYTHON=${PYTHON:-.venv/bin/python}
DATA="$OUT/data"

for trained in 1 "$VIEWS"; do
    RUN="$OUT/views-$trained"
    $PYTHON -m train.structure --preset props --part flow --init "$OUT/export" --data "$DATA" \
        --out "$RUN/structure" --model.flow.views "$trained" --flow.loop.steps "$STEPS" \
        --flow.loop.learning-rate 5e-4
    $PYTHON -m train.dit --preset props --init "$OUT/export" --data "$DATA" --vae "$OUT/vae/latest" \
        --out "$RUN/dit" --model.views "$trained" --flow.loop.steps "$STEPS" \
        --flow.loop.learning-rate 5e-4
    $PYTHON -m train.export --vae "$OUT/vae/latest" --structure "$RUN/structure/flow/latest" \
        --dit "$RUN/dit/latest" --out "$RUN/export" --steps 25 12 --guidance 3
    for given in 1 "$VIEWS"; do
        $PYTHON -m train.evaluate generation --checkpoint "$RUN/export" --data "$DATA" --split val \
            --views "$given" --seeds 0 1 2 --out "$RUN/evaluation-$given"
    done
done
