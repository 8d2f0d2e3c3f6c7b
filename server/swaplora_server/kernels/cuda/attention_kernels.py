"""PagedAttention (vLLM) in Triton: rows of many sequences over their block tables, causal, GQA.

out[row, head] = Σ p v / (Σ p + exp(sink)), p = exp(s), s = scaling · q·k or softcap · tanh(scaling · q·k / softcap),
over the keys that the row may see: up to itself, and of these the last `window`.

Keys are taken in segments of 512, counted from the sequence's first; each is summed from nothing, and the sums are
folded one after the other. Prompts fold in registers, decoding rows in `attention_fold`; all else that both compute is
in the same functions over tiles of the same shape. So a row's bits depend neither on the rows beside it nor on how its
prompt was cut. No atomics. Scores are kept as they are multiplied, or capped; `unit` makes them logarithms to base 2.
"""

import triton
import triton.language as tl

from swaplora_server.kernels.cuda import attention_runs

_SEGMENT = tl.constexpr(attention_runs.SEGMENT)
_DECODE_WORDS = tl.constexpr(attention_runs.DECODE_WORDS)
_ITEM_WORDS = tl.constexpr(attention_runs.ITEM_WORDS)
_TILE_WORDS = tl.constexpr(attention_runs.TILE_WORDS)
_LOG2_E = tl.constexpr(1.4426950408889634)

_QUERY = ("query_row", "query_head")
_LAYER = ("window", "unit", "squash", "softcap")


@triton.jit(do_not_specialize=("key_row", "key_head", "value_row", "value_head", "slots"))
def attention_write(
    key: tl.tensor,
    value: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    key_row: tl.int64,
    key_head: tl.int64,
    value_row: tl.int64,
    value_head: tl.int64,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DIMS: tl.constexpr,
) -> None:
    """keys[slots[row]] = key[row], and values, where the slot is not -1. One program a row and KV head.

    key, value: [num_rows, KV_HEADS, HEAD_DIM or VALUE_DIM], strides in elements
    keys, values: [num_slots, KV_HEADS, HEAD_DIM or VALUE_DIM], contiguous
    slots: [num_rows], int64
    DIMS: a power of two, at least HEAD_DIM and VALUE_DIM
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    if slot >= 0:
        dims = tl.arange(0, DIMS)
        at = slot * KV_HEADS + head
        one = tl.load(key + row * key_row + head * key_head + dims, mask=dims < HEAD_DIM)
        tl.store(keys + at * HEAD_DIM + dims, one, mask=dims < HEAD_DIM)
        other = tl.load(value + row * value_row + head * value_head + dims, mask=dims < VALUE_DIM)
        tl.store(values + at * VALUE_DIM + dims, other, mask=dims < VALUE_DIM)


@triton.jit(do_not_specialize=("blocks", "tiles", *_QUERY, *_LAYER))
def attention_prefill(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    sinks: tl.tensor,
    blocks: tl.tensor,
    tiles: tl.tensor,
    query_row: tl.int64,
    query_head: tl.int64,
    window: tl.int32,
    unit: tl.float32,
    squash: tl.float32,
    softcap: tl.float32,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIMS: tl.constexpr,
    VALUES: tl.constexpr,
) -> None:
    """QUERIES rows and heads of one run. One program a tile, KV head and part of the values.

    query: [num_rows, KV_HEADS · GROUP, HEAD_DIM], strides in elements; out: the same with VALUE_DIM, contiguous
    keys, values: [num_slots, KV_HEADS, HEAD_DIM or VALUE_DIM], contiguous, of the dtype of query
    sinks: [KV_HEADS · GROUP], float32
    blocks: the runs' block tables; tiles: [num_tiles, TILE_WORDS], int64
    KEYS: keys at a time; DIMS: a power of two, at least HEAD_DIM; VALUES: value dims of a program
    """
    parts: tl.constexpr = (VALUE_DIM + VALUES - 1) // VALUES
    head, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    tile = tiles + tl.program_id(0) * _TILE_WORDS
    row, num_rows, first = tl.load(tile), tl.load(tile + 1).to(tl.int32), tl.load(tile + 2).to(tl.int32)
    table = blocks + tl.load(tile + 3)
    flat = tl.load(tile + 4).to(tl.int32) + tl.arange(0, QUERIES)
    token, heads = flat // GROUP, head * GROUP + flat % GROUP
    is_row = token < num_rows
    position = tl.where(is_row, first + token, -1)
    dims = part * VALUES + tl.arange(0, VALUES)
    rows = row + token
    q = _query(query, rows, heads, is_row, query_row, query_head, HEAD_DIM, DIMS)
    stop = tl.max(position, 0) + 1
    low = tl.maximum(first + tl.load(tile + 4).to(tl.int32) // GROUP - window + 1, 0)

    folded = tl.zeros((QUERIES, VALUES), tl.float32)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for segment in range(low // _SEGMENT, tl.cdiv(stop, _SEGMENT)):
        o, m, one_total = _segment(
            q, position, segment, low, stop, head, dims, keys, values, table, window, unit, squash, softcap,
            HAS_SOFTCAP, KV_HEADS, HEAD_DIM, VALUE_DIM, BLOCK_SIZE, QUERIES, KEYS, DIMS, VALUES,
        )  # fmt: skip
        largest, before, now = _shares(largest, m, unit)
        folded = _folded(folded, before[:, None], o, now[:, None])
        total = _folded(total, before, one_total, now)
    if HAS_SINKS:
        total = _with_sink(total, largest, unit, tl.load(sinks + heads, mask=is_row, other=0.0))
    to = out + (rows * (KV_HEADS * GROUP) + heads)[:, None] * VALUE_DIM + dims[None, :]
    mask = is_row[:, None] & (dims < VALUE_DIM)[None, :]
    tl.store(to, _over(folded, total[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("totals", "blocks", "counts", "items", *_QUERY, *_LAYER))
def attention_decode(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    sums: tl.tensor,
    largest: tl.tensor,
    totals: tl.tensor,
    blocks: tl.tensor,
    counts: tl.tensor,
    items: tl.tensor,
    query_row: tl.int64,
    query_head: tl.int64,
    window: tl.int32,
    unit: tl.float32,
    squash: tl.float32,
    softcap: tl.float32,
    HAS_SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIMS: tl.constexpr,
    VALUES: tl.constexpr,
) -> None:
    """One segment of the keys of one row, for `attention_fold`. Persistent: counts[0] says how many items there are.

    sums: [num_items, KV_HEADS · GROUP, VALUE_DIM], largest, totals: [num_items, KV_HEADS · GROUP], float32
    items: [num_items, ITEM_WORDS], int64. Everything else as in `attention_prefill`.
    """
    parts: tl.constexpr = (VALUE_DIM + VALUES - 1) // VALUES
    tiles: tl.constexpr = (GROUP + QUERIES - 1) // QUERIES
    each: tl.constexpr = KV_HEADS * parts * tiles
    for work in range(tl.program_id(0), tl.load(counts) * each, tl.num_programs(0)):
        index, part, head = work // each, work % parts, work // (parts * tiles) % KV_HEADS
        item = items + index * _ITEM_WORDS
        row, at = tl.load(item), tl.load(item + 1).to(tl.int32)
        table, segment = blocks + tl.load(item + 2), tl.load(item + 3).to(tl.int32)
        low = tl.maximum(at - window + 1, 0)
        if segment >= low // _SEGMENT:
            flat = (work // parts % tiles * QUERIES) + tl.arange(0, QUERIES)
            is_row, heads = flat < GROUP, head * GROUP + flat
            position = tl.where(is_row, at, -1)
            dims = part * VALUES + tl.arange(0, VALUES)
            rows = row + tl.zeros((QUERIES,), tl.int64)
            q = _query(query, rows, heads, is_row, query_row, query_head, HEAD_DIM, DIMS)
            o, m, one_total = _segment(
                q, position, segment, low, at + 1, head, dims, keys, values, table, window, unit, squash, softcap,
                HAS_SOFTCAP, KV_HEADS, HEAD_DIM, VALUE_DIM, BLOCK_SIZE, QUERIES, KEYS, DIMS, VALUES,
            )  # fmt: skip
            to = index * (KV_HEADS * GROUP) + heads
            mask = is_row[:, None] & (dims < VALUE_DIM)[None, :]
            tl.store(sums + to[:, None] * VALUE_DIM + dims[None, :], o, mask=mask)
            tl.store(largest + to, m, mask=is_row)
            tl.store(totals + to, one_total, mask=is_row)


@triton.jit(do_not_specialize=("totals", "decodes", "window", "unit"))
def attention_fold(
    sums: tl.tensor,
    largest: tl.tensor,
    totals: tl.tensor,
    out: tl.tensor,
    sinks: tl.tensor,
    decodes: tl.tensor,
    window: tl.int32,
    unit: tl.float32,
    HAS_SINKS: tl.constexpr,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """What `attention_decode` left of each decoding row, folded. One program a row and head; 0 where nothing was left.

    decodes: [num_decodes, DECODE_WORDS], int64; DIMS: a power of two, at least VALUE_DIM; AHEAD: segments read at once
    """
    decode, head = decodes + tl.program_id(0) * _DECODE_WORDS, tl.program_id(1)
    row, at, first_item = tl.load(decode), tl.load(decode + 1).to(tl.int32), tl.load(decode + 2)
    dims = tl.arange(0, DIMS)
    folded = tl.zeros((DIMS,), tl.float32)
    most = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    stop = tl.cdiv(at + 1, _SEGMENT)
    one = tl.arange(0, 1)
    for some in range(tl.maximum(at - window + 1, 0) // _SEGMENT, stop, AHEAD):
        for ahead in tl.static_range(AHEAD):
            segment = some + ahead
            is_there = one + segment < stop
            item = (first_item + segment) * HEADS + head
            o = tl.load(sums + item * VALUE_DIM + dims, mask=(dims < VALUE_DIM) & is_there, other=0.0)
            m = tl.load(largest + item + one, mask=is_there, other=float("-inf"))
            one_total = tl.load(totals + item + one, mask=is_there, other=0.0)
            most, before, now = _shares(most, m, unit)
            folded = _folded(folded, before, o, now)
            total = _folded(total, before, one_total, now)
    if HAS_SINKS:
        total = _with_sink(total, most, unit, tl.load(sinks + head + one))
    to = out + (row * HEADS + head) * VALUE_DIM + dims
    tl.store(to, _over(folded, total).to(out.dtype.element_ty), mask=dims < VALUE_DIM)


@triton.jit
def _query(
    query: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    is_row: tl.tensor,
    query_row: tl.int64,
    query_head: tl.int64,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
) -> tl.tensor:
    """[QUERIES, DIMS], zero where there is nothing."""
    dims = tl.arange(0, DIMS)
    at = query + (rows * query_row + heads * query_head)[:, None] + dims[None, :]
    return tl.load(at, mask=is_row[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _segment(
    q: tl.tensor,
    position: tl.tensor,
    segment: tl.int32,
    low: tl.int32,
    stop: tl.int32,
    head: tl.int32,
    value_dims: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    window: tl.int32,
    unit: tl.float32,
    squash: tl.float32,
    softcap: tl.float32,
    HAS_SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIMS: tl.constexpr,
    VALUES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Σ p v, the largest score and Σ p, p = exp2(unit · (score - the largest)), of one segment.

    Keys before `low` and from `stop` on are seen by no row, and not read.
    """
    o = tl.zeros((QUERIES, VALUES), tl.float32)
    m = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    dims = tl.arange(0, DIMS)
    begin = tl.maximum(segment * _SEGMENT, low // KEYS * KEYS)
    for first in range(begin, tl.minimum(segment * _SEGMENT + _SEGMENT, stop), KEYS):
        at = first + tl.arange(0, KEYS)
        is_read = (at >= low) & (at < stop)
        block = tl.load(table + at // BLOCK_SIZE, mask=is_read, other=0)
        place = (block * BLOCK_SIZE + at % BLOCK_SIZE) * KV_HEADS + head  # int64, as the blocks are
        mask = is_read[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(keys + place[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        if HAS_SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * squash)))
        is_seen = (at[None, :] <= position[:, None]) & (at[None, :] > (position - window)[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        m_next = tl.maximum(m, tl.max(scores, 1))
        base = tl.where(m_next == float("-inf"), 0.0, m_next)
        p = tl.exp2(tl.fma(scores, unit, (base * -unit)[:, None]))
        share = tl.exp2((m - base) * unit)
        total = tl.fma(total, share, tl.sum(p, 1))
        mask = is_read[:, None] & (value_dims < VALUE_DIM)[None, :]
        v = tl.load(values + place[:, None] * VALUE_DIM + value_dims[None, :], mask=mask, other=0.0)
        o = tl.dot(p.to(v.dtype), v, o * share[:, None], input_precision="tf32x3")
        m = m_next
    return o, m, total


# Products and sums are said one by one here: what becomes one instruction is not left to the compiler, which might
# decide one way where prompts are folded, and another where decoding rows are.


@triton.jit
def _shares(most: tl.tensor, m: tl.tensor, unit: tl.float32) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The larger of the largest scores, and what the sums beside each are to be multiplied with."""
    larger = tl.maximum(most, m)
    base = tl.where(larger == float("-inf"), 0.0, larger)
    return larger, tl.exp2((most - base) * unit), tl.exp2((m - base) * unit)


@triton.jit
def _folded(sums: tl.tensor, before: tl.tensor, others: tl.tensor, now: tl.tensor) -> tl.tensor:
    return tl.fma(sums, before, others * now)


@triton.jit
def _with_sink(total: tl.tensor, most: tl.tensor, unit: tl.float32, sink: tl.tensor) -> tl.tensor:
    base = tl.where(most == float("-inf"), 0.0, most)
    return total + tl.exp2(tl.fma(sink, _LOG2_E, base * -unit))


@triton.jit
def _over(sums: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Zero where nothing was summed."""
    return sums / tl.where(total == 0.0, 1.0, total)
