"""Lightning attention, the definition: a token at a time, so short that it can be checked by eye (arXiv 2401.04658, eq. 3-5).

    S_t = exp(-s) S_{t-1} + k_t^T v_t        o_t = q_t S_t          per head; S is [D, D]

Every other backend must agree with this one. It is linear in time but slow: one Python step per token.
"""

import itertools

import torch
from torch import Tensor


def define(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, slopes_H: Tensor, bounds: list[int], initial_NHDD: Tensor) -> tuple[Tensor, Tensor]:
    """One packed row of documents -> (o `[T, H, D]` in q's dtype, the state after each document `[N, H, D, D]`).

    Document n holds tokens bounds[n] .. bounds[n + 1] - 1 and starts from initial_NHDD[n]. The arithmetic is in the dtype of
    the states (fp32, or fp64 for fp64 inputs). Differentiable by autograd.
    """
    q, k, v = (x.to(initial_NHDD.dtype) for x in (q_THD, k_THD, v_THD))
    decay_H11 = torch.exp(-slopes_H.to(initial_NHDD.dtype))[:, None, None]
    outputs, finals = [], []
    for (start, stop), state_HDD in zip(itertools.pairwise(bounds), initial_NHDD.unbind(0), strict=True):
        for t in range(start, stop):
            state_HDD = decay_H11 * state_HDD + k[t, :, :, None] * v[t, :, None, :]
            outputs.append((q[t, :, :, None] * state_HDD).sum(1))
        finals.append(state_HDD)
    o = torch.stack(outputs) if outputs else torch.zeros_like(q)
    final = torch.stack(finals) if finals else initial_NHDD
    return o.to(q_THD.dtype), final
