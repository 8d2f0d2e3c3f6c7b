"""SGMV and BGMV (Punica) in Triton, in two kernels: `lora_shrink` makes h = x Aᵀ, `lora_expand` adds h Bᵀ to y.

y[rows] = (y[rows] + scale · (x[rows] Aᵀ) Bᵀ) · column_scale + scale · shift, entry by entry of each tile.

Both are persistent: as many programs as the card runs at once share the work that the plan's counts tell them of, so
that a captured graph serves whatever is in its buffers. No atomics, and each sum in an order of its own operands alone:
a row's bits do not depend on the rows beside it. Shapes are in fixed tables (`lora_shapes.py`). Up to `GROUP` modules
that share their input go through one launch; of fewer, the others have out_features 0.
"""

import triton
import triton.language as tl

from swaplora_server.kernels.cuda import adapter_tables, lora_shapes, lora_tiles

_ROWS = tl.constexpr(lora_tiles.TILE_ROWS)
_COUNT_WORDS = tl.constexpr(lora_tiles.COUNT_WORDS)
_TILE_WORDS = tl.constexpr(lora_tiles.TILE_WORDS)
_ENTRY_WORDS = tl.constexpr(lora_tiles.ENTRY_WORDS)
_TABLE_WORDS = tl.constexpr(adapter_tables.WORDS)
_ADDS = tl.constexpr(adapter_tables.ADDS)
_IS_BF16_A, _IS_BF16_B = tl.constexpr(adapter_tables.IS_BF16_A), tl.constexpr(adapter_tables.IS_BF16_B)
_SLICE = tl.constexpr(lora_shapes.SLICE)

_NUMBERS = ("number0", "number1", "number2", "number3")
_WIDTHS = ("out_features0", "out_features1", "out_features2", "out_features3")
_STRIDES = ("y_stride0", "y_stride1", "y_stride2", "y_stride3")
_OUTPUTS = ("y0", "y1", "y2", "y3")
_PLAN = ("plan", "first_entry_word", "h", "h_elements", "num_modules")


@triton.jit(do_not_specialize=("x", *_PLAN, "x_stride", "in_features", *_NUMBERS))
def lora_shrink(
    x: tl.tensor,
    plan: tl.tensor,
    first_entry_word: tl.int32,
    h: tl.tensor,
    h_elements: tl.int64,
    num_modules: tl.int32,
    x_stride: tl.int32,
    in_features: tl.int32,
    number0: tl.int32,
    number1: tl.int32,
    number2: tl.int32,
    number3: tl.int32,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
) -> None:
    """h[plane] = x[rows, slice of the features] · A[:, slice]ᵀ of each entry, module and slice of 1024 features.

    x: [num_rows, in_features], float32, float16 or bfloat16; x_stride from row to row
    plan: `Capacity.num_words` of int64; first_entry_word: where its entries begin
    h: [num_planes, num_modules, h_elements], float32; num_planes = in_features / 1024, rounded up
    number0 …: of modules, in the adapters' tables
    RANKS: ranks at a time; BLOCK: features at a time
    IS_ALIGNED: x, x_stride and in_features are multiples of 16
    """
    if IS_ALIGNED:
        # said by arithmetic: the compiler forgets a hint on an argument
        x_stride, in_features = x_stride // 16 * 16, in_features // 16 * 16
    num_planes = tl.cdiv(in_features, _SLICE)
    num_items = tl.load(plan + 1).to(tl.int32) * num_modules * num_planes
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        plane = item % num_planes
        module = item // num_planes % num_modules
        entry = plan + first_entry_word + item // num_planes // num_modules * _ENTRY_WORDS
        number = _pick(module, number0, number1, number2, number3)
        table = _pointer(tl.load(entry), tl.int64) + number * _TABLE_WORDS
        rank = tl.load(table + 4).to(tl.int32)
        if rank > 0:
            a, flags = tl.load(table), tl.load(table + 5)
            h_rows = h + (plane * num_modules + module) * h_elements + tl.load(entry + 1)
            width = tl.load(entry + 2).to(tl.int32)
            x_rows = x + tl.load(entry + 4) * x_stride
            if IS_ALIGNED:
                x_rows = tl.multiple_of(x_rows, 16)
            rows = tl.load(entry + 5).to(tl.int32)
            first = plane * _SLICE
            if _is_bf16(flags, _IS_BF16_A, x.dtype.element_ty):
                a_bf16 = _pointer(a, tl.bfloat16)
                _shrink(x_rows, x_stride, rows, in_features, first, a_bf16, rank, h_rows, width, RANKS, BLOCK)
            else:
                a_own = _pointer(a, x.dtype.element_ty)
                _shrink(x_rows, x_stride, rows, in_features, first, a_own, rank, h_rows, width, RANKS, BLOCK)


@triton.jit
def _shrink(
    x: tl.tensor,
    x_stride: tl.int32,
    rows: tl.int32,
    in_features: tl.int32,
    first: tl.int32,
    a: tl.tensor,
    rank: tl.int32,
    h: tl.tensor,
    width: tl.int32,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One item of `lora_shrink`: x, h at its first row, a: [rank, in_features], `first` of its slice of features."""
    row = tl.arange(0, _ROWS)[:, None]
    stop = tl.minimum(first + _SLICE, in_features)
    for first_rank in range(0, rank, RANKS):
        ranks = first_rank + tl.arange(0, RANKS)[None, :]
        sums = tl.zeros((_ROWS, RANKS), tl.float32)
        for at in range(first, stop, BLOCK):
            features = at + tl.arange(0, BLOCK)
            across, down = features[None, :], features[:, None]
            x_tile = tl.load(x + row * x_stride + across, mask=(row < rows) & (across < in_features), other=0.0)
            a_tile = tl.load(a + ranks * in_features + down, mask=(ranks < rank) & (down < in_features), other=0.0)
            sums = tl.dot(x_tile, a_tile.to(x_tile.dtype), sums, input_precision="ieee")
        tl.store(h + row * width + ranks, sums, mask=(row < rows) & (ranks < rank))


@triton.jit(do_not_specialize=(*_OUTPUTS, *_PLAN, "num_planes", *_WIDTHS, *_STRIDES, *_NUMBERS))
def lora_expand(
    y0: tl.tensor,
    y1: tl.tensor,
    y2: tl.tensor,
    y3: tl.tensor,
    plan: tl.tensor,
    first_entry_word: tl.int32,
    h: tl.tensor,
    h_elements: tl.int64,
    num_modules: tl.int32,
    num_planes: tl.int32,
    out_features0: tl.int32,
    out_features1: tl.int32,
    out_features2: tl.int32,
    out_features3: tl.int32,
    y_stride0: tl.int32,
    y_stride1: tl.int32,
    y_stride2: tl.int32,
    y_stride3: tl.int32,
    number0: tl.int32,
    number1: tl.int32,
    number2: tl.int32,
    number3: tl.int32,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
) -> None:
    """y[rows] = (y[rows] + scale · (Σ h[plane]) Bᵀ) · column_scale + scale · shift, entry by entry of each tile.

    Computed in float32 and rounded once. h goes into half-precision products in two parts, itself and the rest.

    y0 …: [num_rows, out_features] of each module, float32, float16 or bfloat16; y_stride0 … from row to row
    plan, first_entry_word, h, h_elements, number0 …: as of `lora_shrink`; num_planes: of h
    RANKS: ranks at a time; BLOCK: columns at a time
    IS_ALIGNED: y, y_stride and out_features of all modules are multiples of 16
    """
    blocks0, blocks1 = tl.cdiv(out_features0, BLOCK), tl.cdiv(out_features1, BLOCK)
    blocks2, blocks3 = tl.cdiv(out_features2, BLOCK), tl.cdiv(out_features3, BLOCK)
    first2 = blocks0 + blocks1
    first3 = first2 + blocks2
    num_blocks = first3 + blocks3
    num_items = tl.load(plan).to(tl.int32) * num_blocks
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        block = item % num_blocks
        tile = plan + _COUNT_WORDS + item // num_blocks * _TILE_WORDS
        module = (block >= blocks0).to(tl.int32) + (block >= first2).to(tl.int32) + (block >= first3).to(tl.int32)
        number = _pick(module, number0, number1, number2, number3)
        entry = plan + first_entry_word + tl.load(tile + 2) * _ENTRY_WORDS
        num_entries = tl.load(tile + 3).to(tl.int32)
        if _adds(entry, num_entries, number):
            out_features = _pick(module, out_features0, out_features1, out_features2, out_features3)
            y = _pick(module, y0, y1, y2, y3)
            y_stride = _pick(module, y_stride0, y_stride1, y_stride2, y_stride3)
            if IS_ALIGNED:
                y_stride, out_features = y_stride // 16 * 16, out_features // 16 * 16
            columns = (block - _pick(module, 0, blocks0, first2, first3)) * BLOCK + tl.arange(0, BLOCK)
            row = tl.arange(0, _ROWS)
            rows = tl.load(tile + 1).to(tl.int32)
            is_ours = (row < rows)[:, None] & (columns < out_features)[None, :]
            y_rows = y + tl.load(tile) * y_stride
            if IS_ALIGNED:
                y_rows = tl.multiple_of(y_rows, 16)
            at = y_rows + row[:, None] * y_stride + columns[None, :]
            sums = tl.load(at, mask=is_ours, other=0.0).to(tl.float32)
            h_module = h + module * h_elements
            for _ in range(num_entries):
                sums = _expand(
                    sums,
                    entry,
                    number,
                    h_module,
                    num_modules * h_elements,
                    num_planes,
                    rows,
                    columns,
                    out_features,
                    RANKS,
                    y.dtype.element_ty,
                )
                entry += _ENTRY_WORDS
            tl.store(at, sums.to(y.dtype.element_ty), mask=is_ours)


@triton.jit
def _expand(
    sums: tl.tensor,
    entry: tl.tensor,
    number: tl.int32,
    h: tl.tensor,
    plane_stride: tl.int64,
    num_planes: tl.int32,
    rows: tl.int32,
    columns: tl.tensor,
    out_features: tl.int32,
    RANKS: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """(sums + scale · h Bᵀ) · column_scale + scale · shift of one entry, where its table has them."""
    table = _pointer(tl.load(entry), tl.int64) + number * _TABLE_WORDS
    column_scale, shift = tl.load(table + 2), tl.load(table + 3)
    rank = tl.load(table + 4).to(tl.int32)
    scale = tl.load(entry + 3).to(tl.int32).to(tl.float32, bitcast=True)
    if rank > 0:
        b, flags = tl.load(table + 1), tl.load(table + 5)
        h_rows = h + tl.load(entry + 1)
        width = tl.load(entry + 2).to(tl.int32)
        if _is_bf16(flags, _IS_BF16_B, DTYPE):
            b_bf16 = _pointer(b, tl.bfloat16)
            sums += scale * _product(
                h_rows, plane_stride, num_planes, width, rows, b_bf16, rank, columns, out_features, RANKS, DTYPE
            )
        else:
            b_own = _pointer(b, DTYPE)
            sums += scale * _product(
                h_rows, plane_stride, num_planes, width, rows, b_own, rank, columns, out_features, RANKS, DTYPE
            )
    is_column = columns < out_features
    if column_scale != 0:
        sums *= tl.load(_pointer(column_scale, tl.float32) + columns, mask=is_column, other=0.0)[None, :]
    if shift != 0:
        sums += scale * tl.load(_pointer(shift, tl.float32) + columns, mask=is_column, other=0.0)[None, :]
    return sums


@triton.jit
def _product(
    h: tl.tensor,
    plane_stride: tl.int64,
    num_planes: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    b: tl.tensor,
    rank: tl.int32,
    columns: tl.tensor,
    out_features: tl.int32,
    RANKS: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """(Σ h[plane]) Bᵀ of one entry: h at its first row, b: [rank, out_features]. → [16, columns], float32."""
    row = tl.arange(0, _ROWS)[:, None]
    sums = tl.zeros((_ROWS, columns.shape[0]), tl.float32)
    for first_rank in range(0, rank, RANKS):
        ranks = first_rank + tl.arange(0, RANKS)
        across, down = ranks[None, :], ranks[:, None]
        h_tile = tl.zeros((_ROWS, RANKS), tl.float32)
        for plane in range(num_planes):
            at = h + plane * plane_stride + row * width + across
            h_tile += tl.load(at, mask=(row < rows) & (across < rank), other=0.0)
        is_factor = (down < rank) & (columns < out_features)[None, :]
        b_tile = tl.load(b + down * out_features + columns[None, :], mask=is_factor, other=0.0).to(DTYPE)
        high = h_tile.to(DTYPE)
        sums = tl.dot(high, b_tile, sums, input_precision="ieee")
        if tl.float32 != DTYPE:
            sums = tl.dot((h_tile - high.to(tl.float32)).to(DTYPE), b_tile, sums)
    return sums


@triton.jit
def _adds(entry: tl.tensor, num_entries: tl.int32, number: tl.int32) -> tl.int1:
    """Whether any of a tile's adapters adds to the module: what none does is left bit for bit."""
    flags = tl.full((), 0, tl.int64)
    for _ in range(num_entries):
        flags |= tl.load(_pointer(tl.load(entry), tl.int64) + number * _TABLE_WORDS + 5)
        entry += _ENTRY_WORDS
    return (flags & _ADDS) != 0


@triton.jit
def _is_bf16(flags: tl.int64, FLAG: tl.constexpr, DTYPE: tl.constexpr) -> tl.int1:
    """Whether a factor is in bfloat16 beside rows that are not."""
    if tl.bfloat16 == DTYPE:
        return False
    else:
        return (flags & FLAG) != 0


@triton.jit
def _pointer(address: tl.int64, DTYPE: tl.constexpr) -> tl.tensor:
    """All that is pointed to begins at a multiple of 16 bytes."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _pick(module: tl.int32, of0: tl.tensor, of1: tl.tensor, of2: tl.tensor, of3: tl.tensor) -> tl.tensor:
    return tl.where(module < 2, tl.where(module == 0, of0, of1), tl.where(module == 2, of2, of3))
