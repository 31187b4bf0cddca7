"""Use Spatial Sparse Attention as a layer of another model: a point-cloud segmentation head.

python examples/attention_in_another_model.py
"""

import torch
from torch import Tensor, nn

from kernels import BlockIndex, block_mean, spatial_sparse_attention, token_order


class SparseAttentionLayer(nn.Module):
    """Self-attention of voxels with H query heads, G key/value heads and pooled compression."""

    def __init__(self, channels: int, heads: int = 4, kv_heads: int = 2, top_k: int = 8):
        super().__init__()
        self.heads, self.kv_heads, self.top_k = heads, kv_heads, top_k
        self.size = channels // heads
        self.query = nn.Linear(channels, channels, bias=False)
        self.key_value = nn.Linear(channels, 2 * kv_heads * self.size, bias=False)
        self.gates = nn.Linear(channels, 3, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)

    def forward(self, x_NC: Tensor, index: BlockIndex) -> Tensor:
        """Attend. x_NC: [N, C], rows sorted as `token_order` sorts the coordinates of `index`."""
        q_NHD = self.query(x_NC).unflatten(1, (self.heads, self.size))
        key_value = self.key_value(x_NC).unflatten(1, (2, self.kv_heads, self.size))
        k_NGD, v_NGD = key_value.unbind(1)
        ck_PGD, cv_PGD = (
            block_mean(x.flatten(1), index).unflatten(1, (self.kv_heads, self.size))
            for x in (k_NGD, v_NGD)
        )
        out_NHD = spatial_sparse_attention(
            q_NHD,
            k_NGD.contiguous(),
            v_NGD.contiguous(),
            ck_PGD,
            cv_PGD,
            self.gates(x_NC),
            index,
            top_k=self.top_k,
        )
        return x_NC + self.out(out_NHD.flatten(1))


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    # Voxels of a sphere; the label says whether a voxel lies in the upper half.
    directions = nn.functional.normalize(torch.randn(2000, 3), dim=1)
    xyz = ((directions * 0.45 + 0.5) * 32).int().unique(dim=0)
    coords_N4 = nn.functional.pad(xyz, (1, 0)).to(device)  # (asset, x, y, z)
    coords_N4 = coords_N4[token_order(coords_N4)]
    index = BlockIndex.from_coords(coords_N4, 1)
    x_N3 = coords_N4[:, 1:].float() / 16 - 1
    label_N = (coords_N4[:, 2] >= 16).long()

    channels = 64
    embed, layer = nn.Linear(3, channels), SparseAttentionLayer(channels)
    head = nn.Linear(channels, 2)
    model = nn.ModuleList([embed, layer, head]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(30):
        logits_N2 = head(layer(embed(x_N3), index))
        loss = nn.functional.cross_entropy(logits_N2, label_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            accuracy = (logits_N2.argmax(1) == label_N).float().mean().item()
            print(f"step {step + 1}: loss {loss.item():.3f}, accuracy {accuracy:.2f}")


if __name__ == "__main__":
    main()
