"""Triton kernels of the loops over time on low-rank factors, forward and backward.

One launch runs all steps. A program owns BM sequences and BN hidden units for all of them: their
states stay in registers, and the rows of U and columns of V that belong to the units on the chip,
so no weight is read twice. What the programs of the same sequences (a group) have to tell each
other in a step is R numbers a sequence, the codes z = V h, where a dense recurrence passes on all
of h: each writes the part of its units, all wait, each adds up its share, all wait again. Sequences
do not meet, so groups do not wait for each other. All programs must run at once.

T: steps, B: batch, H: hidden size, R: rank (BR: the next power of two), P: programs in a group.
A step has four slots for each unit, side by side as columns 4 unit + slot inside a program, at
slot H + unit in memory. The LSTM's are its gates i, f, g, o. The GRU's are r, z, and of n the
inputs' part and the hidden state's (m), so that U has no rows for the third slot, x none for m.
REVERSE is 1 from the last step to the first, else 0.
"""

# pyright: basic, reportMissingImports=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tanh(x):
    return 2 * _sigmoid(2 * x) - 1


@triton.jit
def _apart(slots, BM: tl.constexpr, BN: tl.constexpr):
    """(BM, 4 BN) -> four (BM, BN)."""
    even, odd = tl.split(tl.reshape(slots, (BM, BN, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _together(first, second, third, fourth, BM: tl.constexpr, BN: tl.constexpr):
    """The inverse of `_apart`."""
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (BM, 4 * BN))


@triton.jit
def _places(program, group, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """Rows inside a program and in all (BM, 1), its units (1, BN), codes (1, BR), and the slot and
    unit of its columns (1, 4 BN).
    """
    row, column = tl.arange(0, BM)[:, None], tl.arange(0, 4 * BN)[None, :]
    units, unit = (program * BN + tl.arange(0, BN))[None, :], program * BN + column // 4
    return row, group * BM + row, units, tl.arange(0, BR)[None, :], column % 4, unit


@triton.jit
def _arrivals(counter, INTERPRETED: tl.constexpr):
    """How often programs of the group have arrived; what they wrote before can be read after."""
    if INTERPRETED:
        return tl.load(counter)
    # Triton drops an acquiring atomic whose result decides nothing, and a volatile load orders
    # nothing.
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.u32 $0, [$1];",
        "=r,l",
        [counter],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _arrive(counter):
    """Tell the group that all this program wrote so far can be read."""
    tl.debug_barrier()  # what any thread wrote comes before the arrival
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def _wait(counter, arrivals, INTERPRETED: tl.constexpr):
    while _arrivals(counter, INTERPRETED) < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def _add_up(
    partial, total, program, first, B, R,
    P: tl.constexpr, PP: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """This program's share of the sum of all parts (P, BM, BR), into rows of (B, R)."""
    parts, share = tl.arange(0, PP), program * SHARE + tl.arange(0, SHARE)
    inside = (parts < P)[:, None] & (share < BM * BR)[None, :]
    # Past the first cache, which may hold what was there in an earlier step.
    place = partial + parts[:, None] * (BM * BR) + share[None, :]
    found = tl.sum(tl.load(place, inside, 0.0, cache_modifier=".cg"), 0)
    row, code = first + share // BR, share % BR
    wanted = (share < BM * BR) & (row < B) & (code < R)
    tl.store(total + row * R + code, found.to(total.dtype.element_ty), wanted)


@triton.jit
def _lstm(i, f, g, o, c, hidden):
    """One step: the gates from their sums, the cells, and h as it is kept in `hidden`."""
    i, f, g, o = _sigmoid(i), _sigmoid(f), _tanh(g), _sigmoid(o)
    c = f * c + i * g
    return i, f, g, o, c, (o * _tanh(c)).to(hidden.dtype.element_ty)


@triton.jit
def _gru(r, z, n, m, h, hidden):
    """One step: as `_lstm`; the state is h as it is kept."""
    r, z = _sigmoid(r), _sigmoid(z)
    n = _tanh(n + r * m)
    h = (n + z * (h - n)).to(hidden.dtype.element_ty)
    return r, z, n, m, h.to(tl.float32), h


@triton.jit
def _lstm_backward(i, f, g, o, before, c, dh, dc):
    """Gradients of the gates' sums, and of the cells that the step began with."""
    squashed = _tanh(c)
    dc += dh * o * (1 - squashed * squashed)
    d_i, d_f, d_g = dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g * g)
    return d_i, d_f, d_g, dh * squashed * o * (1 - o), dc * f


@triton.jit
def _gru_backward(r, z, n, m, before, dh):
    """As `_lstm_backward`; the last is what h takes of the state before it."""
    d_n = dh * (1 - z) * (1 - n * n)
    d_r, d_z = d_n * m * r * (1 - r), dh * (before - n) * z * (1 - z)
    return d_r, d_z, d_n, d_n * r, dh * z


@triton.jit
def _state_before(
    states, hidden, step, T, B, H, of_row, mine, GRU: tl.constexpr, REVERSE: tl.constexpr
):
    """The state that a step began with: cells; of the GRU h0, or the output before this one."""
    place = step + 1 if REVERSE else step - 1
    if not GRU:
        found = tl.load(states + (step + REVERSE) * B * H + of_row, mine, 0.0)
    elif (place >= 0) & (place < T):
        found = tl.load(hidden + place * B * H + of_row, mine, 0.0).to(tl.float32)
    else:
        found = tl.load(states + of_row, mine, 0.0)
    return found


@triton.jit(do_not_specialize=["T", "B"])
def forward(
    from_x, bias_m, u, v, z, states, hidden, slots, last, partial, counters, T, B, H, R,
    GRU: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr, SHARE: tl.constexpr, REVERSE: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """All hidden states (T, B, H) and what backward needs.

    Given: from_x (T, B, G H), the inputs' part of the gates; bias_m (H) of the GRU; U and V; z
    (T, B, R) with the first codes; states (B, H): c0, or h0 of the GRU.
    Made: the other codes; hidden; with SAVE slots (T, B, 4 H) and the LSTM's cells behind c0 in
    states (T + 1, B, H); last (B, H), the LSTM's last cells.
    For exchange: partial (groups, P, BM, BR), counters (groups, 32), zeros.
    """
    G: tl.constexpr = 3 if GRU else 4
    program, group = tl.program_id(0), tl.program_id(1)
    partial, counter = partial + group * P * BM * BR, counters + group * 32
    row, rows, units, codes, slot, unit = _places(program, group, BM, BN, BR)
    mine, mine_wide = (rows < B) & (units < H), (rows < B) & (unit < H)
    coded = (rows < B) & (codes < R)
    in_x, in_u, u_row = mine_wide & (slot < G), unit < H, slot
    if GRU:
        in_u, u_row = in_u & (slot != 2), tl.minimum(slot, 2)
    of_u = tl.load(u + (u_row * H + unit) * R + tl.trans(codes), in_u & (tl.trans(codes) < R), 0.0)
    of_v = tl.load(v + codes * H + tl.trans(units), (tl.trans(units) < H) & (codes < R), 0.0)
    own, of_row, of_code = program * BM * BR + row * BR + codes, rows * H + units, rows * R + codes
    of_x, of_slot = rows * (G * H) + slot * H + unit, rows * (4 * H) + slot * H + unit

    step = T - 1 if REVERSE else 0
    state = tl.load(states + (T * B * H if REVERSE and SAVE and not GRU else 0) + of_row, mine, 0.0)
    x = tl.load(from_x + step * B * G * H + of_x, in_x, 0.0).to(tl.float32)
    if GRU:
        more = tl.load(bias_m + unit, (unit < H) & (slot == 3), 0.0).to(tl.float32)
        x += more
    for s in range(T):
        now = step
        code = tl.load(z + now * B * R + of_code, coded, 0.0, cache_modifier=".cg")
        a, b, c, d = _apart(tl.dot(code, of_u, acc=x, input_precision=PRECISION), BM, BN)
        if GRU:
            a, b, c, d, state, h = _gru(a, b, c, d, state, hidden)
        else:
            a, b, c, d, state, h = _lstm(a, b, c, d, state, hidden)
        if s < T - 1:
            part = tl.dot(h.to(of_v.dtype), of_v, input_precision=PRECISION)
            tl.store(partial + own, part)
            _arrive(counter)
        # What nobody waits for is written and asked for while waiting.
        tl.store(hidden + now * B * H + of_row, h, mine)
        if SAVE:
            all_slots = _together(a, b, c, d, BM, BN).to(slots.dtype.element_ty)
            tl.store(slots + now * B * 4 * H + of_slot, all_slots, mine_wide)
            if not GRU:
                tl.store(states + (now + 1 - REVERSE) * B * H + of_row, state, mine)
        if s < T - 1:
            step = now - 1 if REVERSE else now + 1
            x = tl.load(from_x + step * B * G * H + of_x, in_x, 0.0).to(tl.float32)
            if GRU:
                x += more
            _wait(counter, (2 * s + 1) * P, INTERPRETED)
            _add_up(partial, z + step * B * R, program, group * BM, B, R, P, PP, BM, BR, SHARE)
            _arrive(counter)
            _wait(counter, (2 * s + 2) * P, INTERPRETED)
    if not GRU:
        tl.store(last + of_row, state, mine)


@triton.jit(do_not_specialize=["T", "B"])
def backward(
    d_hidden, d_last, slots, states, hidden, u, v, d_slots, d_z, d_first, partial, counters,
    T, B, H, R,
    GRU: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr, SHARE: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The gradients of what `forward` was given.

    Given: d_hidden (T, B, H), d_last (B, H) of the LSTM's last cells, and what forward kept; states
    are the LSTM's cells of all steps, and the GRU's h0 (its other states are the outputs).
    Made: d_slots (T, B, 4 H), d_z (T, B, R), d_first (B, H) of c0, or of h0 but by its codes.
    """
    program, group = tl.program_id(0), tl.program_id(1)
    partial, counter = partial + group * P * BM * BR, counters + group * 32
    row, rows, units, codes, slot, unit = _places(program, group, BM, BN, BR)
    mine, mine_wide = (rows < B) & (units < H), (rows < B) & (unit < H)
    coded = (rows < B) & (codes < R)
    in_u, u_row = tl.trans(unit) < H, tl.trans(slot)
    if GRU:
        in_u, u_row = in_u & (u_row != 2), tl.minimum(u_row, 2)
    of_u = tl.load(u + (u_row * H + tl.trans(unit)) * R + codes, in_u & (codes < R), 0.0)
    of_v = tl.load(v + tl.trans(codes) * H + units, (units < H) & (tl.trans(codes) < R), 0.0)
    own, of_row, of_code = program * BM * BR + row * BR + codes, rows * H + units, rows * R + codes
    of_slot = rows * (4 * H) + slot * H + unit

    step = 0 if REVERSE else T - 1
    dh = tl.load(d_hidden + step * B * H + of_row, mine, 0.0).to(tl.float32)
    all_slots = tl.load(slots + step * B * 4 * H + of_slot, mine_wide, 0.0).to(tl.float32)
    dc = tl.zeros((BM, BN), tl.float32)
    state = dc
    if not GRU:
        dc += tl.load(d_last + of_row, mine, 0.0)
        state = tl.load(states + (step + 1 - REVERSE) * B * H + of_row, mine, 0.0)
    before = _state_before(states, hidden, step, T, B, H, of_row, mine, GRU, REVERSE)
    for s in range(T):
        now = step
        a, b, c, d = _apart(all_slots, BM, BN)
        if GRU:
            d_a, d_b, d_c, d_d, dc = _gru_backward(a, b, c, d, before, dh)
        else:
            d_a, d_b, d_c, d_d, dc = _lstm_backward(a, b, c, d, before, state, dh, dc)
        d_all = _together(d_a, d_b, d_c, d_d, BM, BN).to(d_slots.dtype.element_ty)
        tl.store(partial + own, tl.dot(d_all, of_u, input_precision=PRECISION))
        _arrive(counter)
        tl.store(d_slots + now * B * 4 * H + of_slot, d_all, mine_wide)
        if s < T - 1:
            step = now + 1 if REVERSE else now - 1
            dh = tl.load(d_hidden + step * B * H + of_row, mine, 0.0).to(tl.float32)
            all_slots = tl.load(slots + step * B * 4 * H + of_slot, mine_wide, 0.0).to(tl.float32)
            state = before
            before = _state_before(states, hidden, step, T, B, H, of_row, mine, GRU, REVERSE)
        _wait(counter, (2 * s + 1) * P, INTERPRETED)
        _add_up(partial, d_z + now * B * R, program, group * BM, B, R, P, PP, BM, BR, SHARE)
        if s < T - 1:
            _arrive(counter)
            _wait(counter, (2 * s + 2) * P, INTERPRETED)
            code = tl.load(d_z + now * B * R + of_code, coded, 0.0, cache_modifier=".cg")
            dh = tl.dot(code, of_v, acc=dh, input_precision=PRECISION)
            if GRU:
                dh += dc
    tl.store(d_first + of_row, dc, mine)
