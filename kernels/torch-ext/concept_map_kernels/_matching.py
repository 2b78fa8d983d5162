"""The kernels behind temporal matching and segment attention: probabilities averaged over heads, tile by tile.

The mean over heads must exist before its maximum is known. So a pass over the keys of a frame comes first, for the
log-sum-exp of every head; then programs hold one `[query, target]` tile, add up its heads, and keep what was asked
for. Nothing of shape `[.., query, target]` is stored. Logits and their sums are to the base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import dot

_NO_LOGIT = tl.constexpr(-1.0e38)  # a start of running maxima; finite, for -inf - -inf is NaN


@triton.jit
def log_sum_kernel(
    query_ptr,
    key_ptr,
    tokens_ptr,
    mask_ptr,
    weights_ptr,
    log_sum_ptr,
    queries,
    keys,
    heads,
    scale,
    query_row,
    query_head,
    query_token,
    key_row,
    key_head,
    key_token,
    log_sum_row,
    log_sum_head,
    log_sum_frame,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    GATHERED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`log2(sum_j 2^(scale q.k_j))` over the `keys` keys of one frame; 0 for a head of weight 0."""
    frame = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64) // heads
    head = tl.program_id(2).to(tl.int64) % heads
    i = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    token = i
    if GATHERED:
        token = tl.load(tokens_ptr + row * queries + i, mask=i < queries, other=0)
    rows = query_ptr + row * query_row + head * query_head + token[:, None] * query_token + d[None, :]
    query = tl.load(rows, mask=(i[:, None] < queries) & (d[None, :] < HEAD_WIDTH), other=0.0)
    columns = key_ptr + row * key_row + head * key_head + frame * keys * key_token + d[:, None]
    skipped = tl.load(weights_ptr + row * heads + head) == 0
    maximum = tl.full((BLOCK_Q,), _NO_LOGIT, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    for start in range(0, tl.where(skipped, 0, keys), BLOCK_P):
        j = start + tl.arange(0, BLOCK_P)
        valid = j < keys
        key = tl.load(
            columns + j[None, :].to(tl.int64) * key_token, mask=valid[None, :] & (d[:, None] < HEAD_WIDTH), other=0.0
        )  # [BLOCK_D, BLOCK_P]
        if MASKED:
            valid = tl.load(mask_ptr + row * keys + j, mask=valid, other=0) != 0
        logit = tl.where(valid[None, :], dot(query, key, PRECISION, UPCAST) * scale, float("-inf"))
        higher = tl.maximum(maximum, tl.max(logit, 1))
        total = total * tl.math.exp2(maximum - higher) + tl.sum(tl.math.exp2(logit - higher[:, None]), 1)
        maximum = higher
    total = tl.maximum(total, 1.0)  # less only where no key counts, and then the sum is that of nothing
    log_sum = tl.where(skipped, 0.0, maximum + tl.math.log2(total))
    out = log_sum_ptr + row * log_sum_row + head * log_sum_head + frame * log_sum_frame
    tl.store(out + i, log_sum, mask=i < queries)


@triton.jit
def _add_heads(
    total,  # [BLOCK_Q, BLOCK_P]
    left,  # (pointers [BLOCK_Q, BLOCK_D] of a batch row, mask, stride of heads)
    right,  # the same [BLOCK_D, BLOCK_P]
    log_sums,  # the same [BLOCK_Q, 1] or [1, BLOCK_P]
    chosen,  # (indices of heads, weights of all heads, how many indices)
    scale,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`total + sum_h w_h 2^(scale left_h.right_h - log_sum_h)` over the chosen heads."""
    for step in range(0, chosen[2]):
        head = tl.load(chosen[0] + step)
        row = tl.load(left[0] + head * left[2], mask=left[1], other=0.0)
        column = tl.load(right[0] + head * right[2], mask=right[1], other=0.0)
        log_sum = tl.load(log_sums[0] + head * log_sums[2], mask=log_sums[1], other=0.0)
        logit = dot(row, column, PRECISION, UPCAST) * scale
        total += tl.load(chosen[1] + head) * tl.math.exp2(logit - log_sum)
    return total


@triton.jit
def _side(base, strides, row, token, valid, along, HEAD_WIDTH: tl.constexpr):
    """(pointers, mask, stride of heads) of `token`'s vectors; `token`, `valid` and `along` broadcast to the tile."""
    return base + row * strides[0] + token * strides[2] + along, valid & (along < HEAD_WIDTH), strides[1]


@triton.jit
def _tile(
    source,  # (query, its strides, key, its strides)
    target,
    log_sums,  # (forward, its strides, backward)
    chosen,
    place,  # (batch row, frame, tokens [BLOCK_Q] of the source frame)
    i,  # [BLOCK_Q] queries
    j,  # [BLOCK_P] tokens of the target frame
    sizes,  # (queries, targets, frames)
    scale,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Weights `[BLOCK_Q, BLOCK_P]` of targets `j` for queries `i`; the caller masks what is beyond the sizes."""
    row, frame, token = place
    queries, targets, frames = sizes
    d = tl.arange(0, BLOCK_D)
    i_valid = i[:, None] < queries
    j_valid = j[None, :] < targets
    place_j = frame * targets + j[None, :]
    total = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
    if FORWARD:
        left = _side(source[0], source[1], row, token[:, None], i_valid, d[None, :], HEAD_WIDTH)
        right = _side(target[2], target[3], row, place_j, j_valid, d[:, None], HEAD_WIDTH)
        strides = log_sums[1]
        pointers = log_sums[0] + row * strides[0] + frame * strides[2] + i[:, None]
        total = _add_heads(total, left, right, (pointers, i_valid, strides[1]), chosen, scale, PRECISION, UPCAST)
    if BACKWARD:
        left = _side(source[2], source[3], row, token[:, None], i_valid, d[None, :], HEAD_WIDTH)
        right = _side(target[0], target[1], row, place_j, j_valid, d[:, None], HEAD_WIDTH)
        strides = log_sums[3]
        pointers = log_sums[2] + row * strides[0] + place_j
        total = _add_heads(total, left, right, (pointers, j_valid, strides[1]), chosen, scale, PRECISION, UPCAST)
    return total


@triton.jit
def match_kernel(
    source_query_ptr,
    source_key_ptr,
    target_query_ptr,
    target_key_ptr,
    tokens_ptr,
    forward_ptr,
    backward_ptr,
    chosen_ptr,
    count_ptr,
    weights_ptr,
    index_ptr,
    value_ptr,
    mass_ptr,
    surprise_ptr,
    queries,
    targets,
    frames,
    heads,
    splits,
    span,
    scale,
    source_query_row,
    source_query_head,
    source_query_token,
    source_key_row,
    source_key_head,
    source_key_token,
    target_query_row,
    target_query_head,
    target_query_token,
    target_key_row,
    target_key_head,
    target_key_token,
    forward_row,
    forward_head,
    forward_frame,
    mask_ptr,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    MASKED: tl.constexpr,
    MAXIMUM_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Largest weight, its lowest index, and sums of w and w log2 w over `span` targets of a frame."""
    split = tl.program_id(0) % splits
    frame = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    i = (tl.program_id(0) // splits).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token = tl.load(tokens_ptr + row * queries + i, mask=i < queries, other=0)
    source_query = (source_query_row, source_query_head, source_query_token)
    source_key = (source_key_row, source_key_head, source_key_token)
    target_query = (target_query_row, target_query_head, target_query_token)
    target_key = (target_key_row, target_key_head, target_key_token)
    source = (source_query_ptr, source_query, source_key_ptr, source_key)
    target = (target_query_ptr, target_query, target_key_ptr, target_key)
    forward = (forward_row, forward_head, forward_frame)
    backward = (heads * frames * targets, frames * targets)
    log_sums = (forward_ptr, forward, backward_ptr, backward)
    chosen = (chosen_ptr + row * heads, weights_ptr + row * heads, tl.load(count_ptr + row))
    best = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    index = tl.zeros((BLOCK_Q,), tl.int32)
    mass = tl.zeros((BLOCK_Q,), tl.float32)
    surprise = tl.zeros((BLOCK_Q,), tl.float32)
    for start in range(split * span, tl.minimum(targets, (split + 1) * span), BLOCK_P):
        j = start + tl.arange(0, BLOCK_P)
        weight = _tile(
            source, target, log_sums, chosen, (row, frame, token), i, j, (queries, targets, frames), scale,
            HEAD_WIDTH, BLOCK_D, BLOCK_Q, BLOCK_P, FORWARD, BACKWARD, PRECISION, UPCAST,
        )  # fmt: skip
        if MASKED:
            kept = tl.load(mask_ptr + row * targets + j, mask=j < targets, other=0) != 0
            weight = tl.where(kept[None, :], weight, 0.0)
        weight = tl.where(j[None, :] < targets, weight, float("-inf"))
        largest = tl.max(weight, 1)
        if not MAXIMUM_ONLY:
            lowest = tl.min(tl.where(weight == largest[:, None], j[None, :], 2147483647), 1)
            index = tl.where(largest > best, lowest, index)
            mass += tl.sum(tl.maximum(weight, 0.0), 1)
            positive = tl.where(weight > 0.0, weight, 1.0)
            surprise += tl.sum(positive * tl.math.log2(positive), 1)
        best = tl.maximum(best, largest)
    out = ((row * frames + frame) * splits + split) * queries + i
    tl.store(value_ptr + out, best, mask=i < queries)
    if not MAXIMUM_ONLY:
        tl.store(index_ptr + out, index, mask=i < queries)
        tl.store(mass_ptr + out, mass, mask=i < queries)
        tl.store(surprise_ptr + out, surprise, mask=i < queries)


@triton.jit
def window_kernel(
    source_query_ptr,
    source_key_ptr,
    target_query_ptr,
    target_key_ptr,
    tokens_ptr,
    forward_ptr,
    backward_ptr,
    chosen_ptr,
    count_ptr,
    weights_ptr,
    index_ptr,
    mass_ptr,
    right_ptr,
    down_ptr,
    queries,
    targets,
    frames,
    heads,
    splits,
    span,
    width,
    radius,
    scale,
    source_query_row,
    source_query_head,
    source_query_token,
    source_key_row,
    source_key_head,
    source_key_token,
    target_query_row,
    target_query_head,
    target_query_token,
    target_key_row,
    target_key_head,
    target_key_token,
    forward_row,
    forward_head,
    forward_frame,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Sums of w, w dx and w dy over the tokens of a window around the match that are among `span` targets."""
    split = tl.program_id(0) % splits
    frame = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    i = (tl.program_id(0) // splits).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token = tl.load(tokens_ptr + row * queries + i, mask=i < queries, other=0)
    source_query = (source_query_row, source_query_head, source_query_token)
    source_key = (source_key_row, source_key_head, source_key_token)
    target_query = (target_query_row, target_query_head, target_query_token)
    target_key = (target_key_row, target_key_head, target_key_token)
    source = (source_query_ptr, source_query, source_key_ptr, source_key)
    target = (target_query_ptr, target_query, target_key_ptr, target_key)
    forward = (forward_row, forward_head, forward_frame)
    backward = (heads * frames * targets, frames * targets)
    log_sums = (forward_ptr, forward, backward_ptr, backward)
    chosen = (chosen_ptr + row * heads, weights_ptr + row * heads, tl.load(count_ptr + row))
    # What is beyond the queries repeats the last one, and so does not widen the range of lines.
    match = tl.load(index_ptr + (row * frames + frame) * queries + tl.minimum(i, queries - 1))
    column = match % width
    line = match // width
    reach_x = tl.minimum(radius, tl.minimum(column, width - 1 - column))
    reach_y = tl.minimum(radius, tl.minimum(line, targets // width - 1 - line))
    mass = tl.zeros((BLOCK_Q,), tl.float32)
    right = tl.zeros((BLOCK_Q,), tl.float32)
    down = tl.zeros((BLOCK_Q,), tl.float32)
    first = tl.maximum(split * span, tl.min(line - reach_y, 0) * width)
    end = tl.minimum((split + 1) * span, (tl.max(line + reach_y, 0) + 1) * width)
    for start in range(first, end, BLOCK_P):
        j = start + tl.arange(0, BLOCK_P)
        weight = _tile(
            source, target, log_sums, chosen, (row, frame, token), i, j, (queries, targets, frames), scale,
            HEAD_WIDTH, BLOCK_D, BLOCK_Q, BLOCK_P, FORWARD, BACKWARD, PRECISION, UPCAST,
        )  # fmt: skip
        dx = (j % width)[None, :] - column[:, None]
        dy = (j // width)[None, :] - line[:, None]
        near = (tl.abs(dx) <= reach_x[:, None]) & (tl.abs(dy) <= reach_y[:, None])
        weight = tl.where(near & (j[None, :] < end), weight, 0.0)
        mass += tl.sum(weight, 1)
        right += tl.sum(weight * dx.to(tl.float32), 1)
        down += tl.sum(weight * dy.to(tl.float32), 1)
    out = ((row * frames + frame) * splits + split) * queries + i
    tl.store(mass_ptr + out, mass, mask=i < queries)
    tl.store(right_ptr + out, right, mask=i < queries)
    tl.store(down_ptr + out, down, mask=i < queries)
