import sys, time
from pathlib import Path
from dataclasses import replace
import numpy as np, torch
torch.set_num_threads(2)
from model.structure import Structure
from model.checkpoint import load_model
from model.config import SamplingOptions, Guidance
from train.stages.structure.config import STRUCTURE_PRESETS
from train.stages.structure.data import GridLoader
from train.stages.structure import task as T
from train.data.bricks import read_build_index
from train.engine.batch_sampler import SampleId
from model.rectified_flow import interpolate, velocity_target
from model.sparse_tensor import SparseTensor
from model.occupancy_vae import occupancy_grid
from pipeline.core.primitives.voxel_iou import intersection_over_union
cfg = replace(STRUCTURE_PRESETS["props"], data=Path("/tmp/props-scratch/shapes"))
model = load_model(Path(sys.argv[1]), Structure).eval() if sys.argv[1]!="-" else None
ix = read_build_index(cfg.data, [256]); tr, va = ix.split("train"), ix.split("val")
print(model.flow.dit.mean if hasattr(model.flow.dit,'mean') else '', flush=True)
@torch.no_grad()
def errs(index, use, shuffle=False, drop=False, n=16, epoch=0):
    l = GridLoader(index, cfg, images=True, use=use)
    assets = np.linspace(0, len(index)-1, n).astype(int)
    b = l.batch([SampleId(int(a), epoch) for a in assets], 1.0)
    level = T.latent_level(cfg, b)
    x0 = model.flow.dit.normalize(T.grid_to_rows(model.vae.encode(b.occupied).mean, level))
    out=[]
    imgs=b.images
    if shuffle:
        b2 = l.batch([SampleId(int(a), epoch) for a in np.roll(assets,3)], 1.0); imgs=b2.images
    for t in (0.1,.3,.5,.7,.9):
        tb=torch.full((n,),t)
        x=interpolate(x0,b.noise,tb[level.coords[:,0].long()])
        v=model(SparseTensor(x,level),tb,imgs,torch.full((n,),drop))
        out.append(float((v-velocity_target(x0,b.noise)).square().mean()))
    return [round(o,3) for o in out], round(float(x0.std()),2)
@torch.no_grad()
def gen(index, use, scale, n=10, steps=25):
    l = GridLoader(index, cfg, images=True, use=use)
    ious=[]
    assets = np.linspace(0, len(index)-1, n).astype(int)
    for a in assets:
        b = l.batch([SampleId(int(a), 0)], 1.0)
        tok = model.flow.encode_images(b.images)
        level = model.generate(tok, [int(a)], SamplingOptions(steps=steps, guidance=Guidance(scale=scale)))
        c = occupancy_grid(level.coords, level.resolution, 1)
        ious.append(float(intersection_over_union(c, b.occupied).float()))
    return round(float(np.mean(ious)),3), [round(i,2) for i in ious]
for s,st in ((1.0,1),(1.0,4),(1.0,25),(1.5,8),(3.0,25)):
    print("guidance", s, "steps", st, "train", gen(tr,"held_out",s,6,st), "val", gen(va,"validation",s,8,st), flush=True)
