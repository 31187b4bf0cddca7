#!/bin/sh
# The run of the Direct3D-S2 paper (arXiv 2505.17412): 452,000 assets, then every training stage on 8 GPUs.
# Step 1 is submitted to a Ray cluster (cluster.yaml). The other steps run on the machine with the GPUs,
# which must see the build as a directory. Every step is resumable: run the script again.
set -eu
DATA=${DATA:-/shared/paper}
GPUS=${GPUS:-8}
HEAD=${HEAD:-http://127.0.0.1:8265}

# 1. Data: about 2,900 core-hours per million assets looked at, and 6 TB. `python` is the head's.
ray job submit --address "$HEAD" -- python -m pipeline.build --preset paper --source objaverse --out "$DATA"
python -m pipeline.verify "$DATA"

train() { torchrun --nproc-per-node "$GPUS" -m "$@" --data "$DATA"; }

# 2. The sparse SDF VAE at 256, 384 and 512, then at 1024. The paper: one day each on 8 A100.
train train.vae --preset base
train train.vae --preset base-1024

# 3. Latents of every asset.
train train.encode --vae runs/vae-base/latest --resolutions 256 384 512
train train.encode --vae runs/vae-base-1024/latest --resolutions 1024

# 4. The diffusion transformer, from coarse to fine. The paper: seven days on 8 A100.
for preset in 256 384 512 1024; do
    train train.dit --preset "$preset" --cameras paper-ibl
done

# 5. The structure stage. The paper: seven days on 8 A100.
train train.structure --preset base --cameras paper-ibl

# 6. Collect the models, generate, evaluate.
python -m train.export --vae runs/vae-base/latest --structure runs/structure-base/flow/latest --dit runs/dit-512/latest
python -m train.evaluate generation --checkpoint runs/export --data "$DATA" --cameras paper-ibl --split val --limit 100
