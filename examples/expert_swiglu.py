"""The sparse expert layer as two plain Triton kernels, to read before `kernels/ops/experts/kernels.py`.

    python examples/expert_swiglu.py                       # on a GPU
    TRITON_INTERPRET=1 python examples/expert_swiglu.py    # in Triton's interpreter, on a CPU

T tokens, K experts per token, N = T K slots (a token and one of its experts), E experts, H hidden, I intermediate

The kernels of the package add quantized weights, TMA, tiles chosen by size and architecture, a path for few tokens that
sorts nothing, the sum of a token's experts fused with the next norm, and bf16 in the interpreter.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

TILE = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}


def reference(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """x [T,H], gate_up [E,2I,H], down [E,H,I], ids and weights [T,K] -> [T,H] (Shazeer 2020; Mixtral, section 2.1)."""
    out = torch.zeros_like(x)
    for token, (experts, shares) in enumerate(zip(ids.tolist(), weights, strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            out[token] += share * (down[expert] @ (F.silu(gate) * up))
    return out


@triton.jit
def rows_of_expert(order_ptr, offsets_ptr, BLOCK_M: tl.constexpr):
    """The rows of this program's tile in sorted order, their slots, and which of them are the expert's."""
    expert, tile = tl.program_id(2), tl.program_id(0)
    rows = tl.load(offsets_ptr + expert) + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = rows < tl.load(offsets_ptr + expert + 1)
    return rows, tl.load(order_ptr + rows, mask=mask, other=0), mask


@triton.jit
def up_kernel(
    x_ptr,  # [T, H]
    order_ptr,  # [N] slots, sorted by expert
    offsets_ptr,  # [E + 1] where the slots of each expert begin
    gate_up_ptr,  # [E, 2 I, H]
    h_ptr,  # [N, I] out, in sorted order
    H, I, TOP_K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, slots, mask = rows_of_expert(order_ptr, offsets_ptr, BLOCK_M)
    if tl.sum(mask.to(tl.int32), axis=0) > 0:  # a tile behind the expert's last row has nothing to do
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        weight = gate_up_ptr + tl.program_id(2).to(tl.int64) * 2 * I * H
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, H, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x_mask, w_mask = mask[:, None] & (k < H)[None, :], (columns < I)[None, :] & (k < H)[:, None]
            x = tl.load(x_ptr + (slots // TOP_K).to(tl.int64)[:, None] * H + k[None, :], mask=x_mask, other=0.0)
            w_ptrs = weight + columns[None, :] * H + k[:, None]
            gate = tl.dot(x, tl.load(w_ptrs, mask=w_mask, other=0.0), gate, input_precision="ieee")
            w_ptrs += I * H  # the rows of up follow those of the gate
            up = tl.dot(x, tl.load(w_ptrs, mask=w_mask, other=0.0), up, input_precision="ieee")
        h = gate * tl.sigmoid(gate) * up
        out = h_ptr + rows.to(tl.int64)[:, None] * I + columns[None, :]
        tl.store(out, h.to(h_ptr.dtype.element_ty), mask=mask[:, None] & (columns < I)[None, :])


@triton.jit
def down_kernel(
    h_ptr,  # [N, I], in sorted order
    order_ptr, offsets_ptr,  # as above
    down_ptr,  # [E, H, I]
    y_ptr,  # [N, H] out, in the order of slots
    H, I,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, slots, mask = rows_of_expert(order_ptr, offsets_ptr, BLOCK_M)
    if tl.sum(mask.to(tl.int32), axis=0) > 0:
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        weight = down_ptr + tl.program_id(2).to(tl.int64) * H * I
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, I, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            h_mask, w_mask = mask[:, None] & (k < I)[None, :], (columns < H)[None, :] & (k < I)[:, None]
            h = tl.load(h_ptr + rows.to(tl.int64)[:, None] * I + k[None, :], mask=h_mask, other=0.0)
            w_ptrs = weight + columns[None, :] * I + k[:, None]
            y = tl.dot(h, tl.load(w_ptrs, mask=w_mask, other=0.0), y, input_precision="ieee")
        out = y_ptr + slots.to(tl.int64)[:, None] * H + columns[None, :]
        tl.store(out, y, mask=mask[:, None] & (columns < H)[None, :])


def expert_swiglu(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """As `reference`, for x and the experts in fp32, or on a GPU in bf16 or fp16; ids int64, weights fp32."""
    (T, H), (E, _, I), K = x.shape, down.shape, ids.shape[1]
    order = ids.flatten().argsort(stable=True)
    offsets = F.pad(torch.bincount(ids.flatten(), minlength=E).cumsum(0), (1, 0))
    h, y = x.new_empty((T * K, I)), x.new_empty((T * K, H), dtype=torch.float32)
    tiles = triton.cdiv(T, TILE["BLOCK_M"])  # an expert has at most one slot of each token
    up_grid, down_grid = ((tiles, triton.cdiv(n, TILE["BLOCK_N"]), E) for n in (I, H))
    up_kernel[up_grid](x, order, offsets, gate_up, h, H, I, K, **TILE)
    down_kernel[down_grid](h, order, offsets, down, y, H, I, **TILE)
    return (y.view(T, K, H) * weights[..., None]).sum(1).to(x.dtype)


if __name__ == "__main__":
    device, (T, K, E, H, I) = "cuda" if torch.cuda.is_available() else "cpu", (20, 2, 4, 80, 48)
    if device == "cpu" and isinstance(up_kernel, triton.JITFunction):
        raise SystemExit("there is no GPU: TRITON_INTERPRET=1 interprets the kernels on the CPU")
    x, gate_up, down = torch.randn(T, H), torch.randn(E, 2 * I, H) / H**0.5, torch.randn(E, H, I) / I**0.5
    weights, ids = torch.randn(T, E).softmax(-1).topk(K)
    args = [tensor.to(device) for tensor in (x, gate_up, down, ids, weights / weights.sum(-1, keepdim=True))]
    error = (expert_swiglu(*args) - reference(*args)).abs().max() / reference(*args).abs().max()
    print(f"largest error beside the reference: {error:.1e} of the largest value")
