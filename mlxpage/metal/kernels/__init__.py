"""Paged attention on a GPU: the texts in metal/, compiled for Metal or CUDA, a function for each.

`reference` has the same functions in plain MLX, and says what they compute. Here the pools are
written in place, behind MLX's back, so the order is carried by fences: small arrays that MLX does
see. A layer's write gives one, and whatever reads that layer's pool takes it in; a write takes what
comes after every read of the step before. Attention that appends the row that it is for is both.
On a GPU nothing but these kernels touches a pool.
"""

from mlxpage.metal.kernels.attention import paged_attention
from mlxpage.metal.kernels.latent import latent_attention
from mlxpage.metal.kernels.moving import copy_blocks, gather, write
from mlxpage.metal.kernels.pool import COMPILES, LOOK_AHEAD, Pool, Step
from mlxpage.metal.kernels.work import latent_cost, latent_tiling, plan_work, run_cost, tiling

__all__ = [
    "COMPILES",
    "LOOK_AHEAD",
    "Pool",
    "Step",
    "copy_blocks",
    "gather",
    "latent_attention",
    "latent_cost",
    "latent_tiling",
    "paged_attention",
    "plan_work",
    "run_cost",
    "tiling",
    "write",
]
