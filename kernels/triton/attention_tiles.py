"""Tiles of attention's kernels: rows of one head, cut into pieces of the head dim, and their products."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvit.triton.launch import before, dot, narrow, store


@triton.constexpr_function
def last(pieces, i):
    """Return whether piece ``i`` is the last one."""
    return i + 1 == len(pieces)


@triton.jit
def head_rows(pointer, strides, image, head, UNIT: tl.constexpr, start=0):
    """Return (token ``start`` of a head of an image, the step to the next); strides are (image, token, head) / UNIT."""
    step = tl.full((), UNIT, tl.int64)
    first = pointer + image * (strides[0] * step) + head * (strides[2] * step) + start * (strides[1] * step)
    return first, strides[1] * step


@triton.jit
def full_blocks(length, BLOCK: tl.constexpr):
    """Return how many of ``length`` rows come in full blocks, with a tail left; 0 for a BLOCK of 0."""
    rows = 0
    if BLOCK:
        rows = tl.maximum(length - 1, 0) // BLOCK * BLOCK
    return rows


@triton.jit
def load_rows(x, start, limit, ROWS: tl.constexpr, DIM: tl.constexpr, PIECES: tl.constexpr, EDGE: tl.constexpr):
    """Load ROWS rows from start, a (ROWS, piece) tile for each piece of DIM; with EDGE, 0 from row ``limit`` on."""
    rows = start + tl.arange(0, ROWS)
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        columns = before(PIECES, i) + tl.arange(0, PIECES[i])
        pointers = x[0] + rows[:, None] * x[1] + columns[None, :]
        if EDGE or before(PIECES, i + 1) > DIM:
            inside = (rows[:, None] < limit) & (columns[None, :] < DIM)
            tiles += (tl.load(pointers, mask=inside, other=0.0),)
        else:
            tiles += (tl.load(pointers),)
    return tiles


@triton.jit
def pick_rows(x, rows, inside, DIM: tl.constexpr, PIECES: tl.constexpr):
    """Load rows of x = (first, step), a (len(rows), piece) tile for each piece of DIM; 0 where not inside."""
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        columns = before(PIECES, i) + tl.arange(0, PIECES[i])
        pointers = x[0] + rows[:, None] * x[1] + columns[None, :]
        tiles += (tl.load(pointers, mask=inside[:, None] & (columns < DIM)[None, :], other=0.0),)
    return tiles


@triton.jit
def store_rows(x, start, limit, tiles, ROWS: tl.constexpr, DIM: tl.constexpr, PIECES: tl.constexpr):
    """Store what :func:`load_rows` loads, in the dtype of x; nothing is written from row ``limit`` on."""
    rows = start + tl.arange(0, ROWS)
    for i in tl.static_range(len(PIECES)):
        columns = before(PIECES, i) + tl.arange(0, PIECES[i])
        inside = (rows[:, None] < limit) & (columns[None, :] < DIM)
        pointers = x[0] + rows[:, None] * x[1] + columns[None, :]
        store(pointers, tiles[i], inside)


@triton.jit
def zero_rows(ROWS: tl.constexpr, PIECES: tl.constexpr):
    """Return a float32 accumulator (ROWS, piece) for each piece of the head dim."""
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        tiles += (tl.full((ROWS, PIECES[i]), 0.0, tl.float32),)
    return tiles


@triton.jit
def scaled(tiles, factor):
    """Return every tile times a float32 factor, in the tile's dtype."""
    out = ()
    for i in tl.static_range(len(tiles)):
        out += ((tiles[i].to(tl.float32) * factor).to(tiles[i].dtype),)
    return out


@triton.jit
def products(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """Return a b^T (ROWS, COLUMNS) in float32, contracted over every piece of the head dim."""
    out = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for i in tl.static_range(len(a)):
        out = dot(a[i], b[i].T, out, PRECISION)
    return out


@triton.jit
def add_products(acc, p, tiles, PRECISION: tl.constexpr):
    """Return acc + p @ tile, piece by piece of the head dim; p is rounded to the tiles' dtype."""
    out = ()
    for i in tl.static_range(len(tiles)):
        out += (dot(narrow(p, tiles[i].dtype), tiles[i], acc[i], PRECISION),)
    return out


@triton.jit
def _turned(N: tl.constexpr, a, x):
    """Return the place, of N, that query ``a`` has for neighbour ``x``, and for the neighbour at that place: x."""
    return (a - x - 1) & (N - 1)


@triton.constexpr_function
def _blocks(queries, n):
    """Return how many blocks of ``n`` rows hold the queries + n - 1 neighbours of :func:`diagonals`."""
    return (queries + n - 2) // n + 1


@triton.jit
def neighbours(m, first, limit, N: tl.constexpr, DIM: tl.constexpr, PIECES: tl.constexpr, dtype: tl.constexpr):
    """Load rows first .. first + N of m in ``dtype``; those outside 0 .. limit are 0."""
    rows = first + tl.arange(0, N)
    picked = pick_rows(m, rows, (rows >= 0) & (rows < limit), DIM, PIECES)
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        if picked[i].dtype == dtype:
            tiles += (picked[i],)
        else:
            tiles += (narrow(picked[i].to(tl.float32), dtype),)
    return tiles


@triton.jit
def diagonals(
    q,  # tiles (QUERIES, piece)
    m,  # (where its rows start, step)
    first,
    limit,
    QUERIES: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return q[a] . m[first + N - 1 + a - x] for a < QUERIES, x < N: (QUERIES, N) float32, (N, QUERIES) if TRANSPOSED.

    Rows of m outside 0 .. limit are taken to be 0. The neighbours come in blocks of N rows. Of each column of the
    products with them a query needs only one block's: these make one tile, in which every query has its neighbours
    in another order, and which a gather sorts.
    """
    a, x = tl.arange(0, QUERIES)[:, None], tl.arange(0, N)[None, :]
    if TRANSPOSED:
        a, x = tl.arange(0, QUERIES)[None, :], tl.arange(0, N)[:, None]
    block = a // N + (x < a % N).to(tl.int32)
    needed = tl.full((N, QUERIES) if TRANSPOSED else (QUERIES, N), 0.0, tl.float32)
    for n in tl.static_range(_blocks(QUERIES, N)):
        rows = neighbours(m, first + n * N, limit, N, DIM, PIECES, q[0].dtype)
        s = products(rows, q, N, QUERIES, PRECISION) if TRANSPOSED else products(q, rows, QUERIES, N, PRECISION)
        needed = tl.where(block == n, s, needed)
    return tl.gather(needed, _turned(N, a, x), 0 if TRANSPOSED else 1)


@triton.jit
def add_diagonals(
    acc,  # float32 tiles (QUERIES, piece)
    p,  # (QUERIES, N)
    m,
    first,
    limit,
    QUERIES: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    dtype: tl.constexpr,  # of the products
    PRECISION: tl.constexpr,
):
    """Return acc[a] + the sum of p[a, x] m[first + N - 1 + a - x] over x: the derivative of :func:`diagonals` by q."""
    a, x = tl.arange(0, QUERIES)[:, None], tl.arange(0, N)[None, :]
    block = a // N + (x < a % N).to(tl.int32)
    turned = tl.gather(p, _turned(N, a, x), 1)
    for n in tl.static_range(_blocks(QUERIES, N)):
        rows = neighbours(m, first + n * N, limit, N, DIM, PIECES, dtype)
        acc = add_products(acc, tl.where(block == n, turned, 0.0), rows, PRECISION)
    return acc
