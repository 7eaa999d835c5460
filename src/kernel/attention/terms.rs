//! What stands between `s Q Kᵀ` and the softmax: a factor, a bias and a mask per pair of positions; and the score kernels.

use super::super::{exp_of_softmax, get, put};
use super::Bias;
use crate::simd::{Kernel, LANES, Vector};
use crate::tensor::{Buffer, Float};

/// Multiplies the logits: `Z = F ⊙ (s Q Kᵀ)`, read at the positions of query and key; shared by all images.
#[derive(Clone, Copy)]
pub struct Factor<'a, T> {
    /// The values.
    pub table: FactorTable<'a, T>,
    /// Positions in front (class tokens) whose rows and columns keep the factor 1: position `prefix + i` reads entry `i`.
    pub prefix: usize,
}

/// The values of a [`Factor`].
#[derive(Clone, Copy)]
pub enum FactorTable<'a, T> {
    /// Every pair of positions has its own.
    Dense {
        /// `[heads, side, side]`, or `[side, side]` if `shared`.
        data: &'a [T],
        /// Rows and columns.
        side: usize,
        /// All heads read the same values.
        shared: bool,
    },
    /// Pairs of positions on a grid (row-major) with equal `|Δy|`, `|Δx|` have the same.
    Distance {
        /// `[heads, H, W]`: the value for `|Δy|`, `|Δx|`.
        data: &'a [T],
        /// Rows H and columns W of the grid.
        grid: [usize; 2],
    },
}

/// Additive logits without gradient `[count, side, side]`, shared by all heads: group g of image b of G groups reads table
/// `(b G + g) mod count`.
#[derive(Clone, Copy)]
pub struct Mask<'a, T> {
    /// The tables.
    pub data: &'a [T],
    /// How many tables there are.
    pub count: usize,
    /// Rows and columns of a table.
    pub side: usize,
}

/// `Z = F ⊙ (s Q Kᵀ) + A + M`.
#[derive(Clone, Copy)]
pub struct Terms<'a, T> {
    /// F.
    pub factor: Option<Factor<'a, T>>,
    /// A.
    pub bias: Option<Bias<'a, T>>,
    /// M.
    pub mask: Option<Mask<'a, T>>,
}

impl<T> Default for Terms<'_, T> {
    fn default() -> Self {
        Terms { factor: None, bias: None, mask: None }
    }
}

/// Where the gradients of [`Terms`] are added to: `dF` of the shape of the factor's `data`, `dA` `[heads, side, side]`.
pub struct TermGradients<'a, T> {
    /// dF.
    pub factor: Option<&'a mut [T]>,
    /// dA.
    pub bias: Option<&'a mut [T]>,
}

impl<T> Default for TermGradients<'_, T> {
    fn default() -> Self {
        TermGradients { factor: None, bias: None }
    }
}

/// Whether numbers follow each other.
pub(super) fn is_run(numbers: &[u32]) -> bool {
    numbers.windows(2).all(|w| w[1] == w[0] + 1)
}

/// The positions of some keys.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    pub positions: &'a [u32],
    pub run: bool,
}

impl<'a> Keys<'a> {
    pub fn new(positions: &'a [u32]) -> Self {
        Keys { positions, run: is_run(positions) }
    }
}

/// Where a pair of positions reads in the table of one head.
#[derive(Clone, Copy)]
pub(super) struct Places {
    kind: Kind,
    prefix: u32,
}

#[derive(Clone, Copy)]
enum Kind {
    /// `[side, side]`.
    Dense(usize),
    /// `[H, 2W − 1]`: `|Δy|` and `W − 1 + Δx`, so that the keys of a grid row read a run.
    Distance([usize; 2]),
}

impl Places {
    fn dense(side: usize) -> Self {
        Places { kind: Kind::Dense(side), prefix: 0 }
    }

    /// The length of a head's table.
    fn len(&self) -> usize {
        match self.kind {
            Kind::Dense(side) => side * side,
            Kind::Distance([h, w]) => h * (2 * w - 1),
        }
    }

    fn at(&self, query: usize, key: usize) -> usize {
        match self.kind {
            Kind::Dense(side) => query * side + key,
            Kind::Distance([_, w]) => (query / w).abs_diff(key / w) * (2 * w - 1) + w - 1 + key % w - query % w,
        }
    }

    /// Calls `f(first entry of the table or none (factor 1), first key, keys)` for the runs that the keys of a query read.
    #[inline(always)]
    fn visit(&self, query: u32, keys: Keys, mut f: impl FnMut(Option<usize>, usize, usize)) {
        let (n, prefix) = (keys.positions.len(), self.prefix);
        if n == 0 {
            return;
        }
        if query < prefix {
            return f(None, 0, n);
        }
        let query = (query - prefix) as usize;
        if !keys.run {
            for (j, &k) in keys.positions.iter().enumerate() {
                f(k.checked_sub(prefix).map(|k| self.at(query, k as usize)), j, 1);
            }
            return;
        }
        let first = keys.positions[0];
        let ones = (prefix.saturating_sub(first) as usize).min(n);
        if ones > 0 {
            f(None, 0, ones);
        }
        if ones == n {
            return;
        }
        let first = first as usize + ones - prefix as usize;
        match self.kind {
            Kind::Dense(side) => f(Some(query * side + first), ones, n - ones),
            Kind::Distance([_, w]) => {
                let (y, x) = (query / w, query % w);
                let (mut ky, mut kx, mut j) = (first / w, first % w, ones);
                while j < n {
                    let len = (w - kx).min(n - j);
                    f(Some(y.abs_diff(ky) * (2 * w - 1) + w - 1 + kx - x), j, len);
                    (ky, kx, j) = (ky + 1, 0, j + len);
                }
            }
        }
    }
}

/// A term as the scores of one head read it.
#[derive(Clone, Copy)]
pub(super) struct HeadTable<'a, T> {
    data: &'a [T],
    places: Places,
}

impl<T: Float> HeadTable<'_, T> {
    /// The values for all keys of a query: in place where they follow each other, else gathered in `line`.
    #[inline(always)]
    fn line<'s>(&'s self, query: u32, keys: Keys, line: &'s mut [T]) -> &'s [T] {
        let n = keys.positions.len();
        if let (Kind::Dense(side), 0, true) = (self.places.kind, self.places.prefix, keys.run) {
            let from = query as usize * side + keys.positions[0] as usize;
            return &self.data[from..from + n];
        }
        self.places.visit(query, keys, |at, j, len| match at {
            None => line[j..j + len].fill(T::ONE),
            Some(at) if len == 1 => line[j] = self.data[at],
            Some(at) => line[j..j + len].copy_from_slice(&self.data[at..at + len]),
        });
        &line[..n]
    }
}

/// The places of the terms' tables: what is needed to gather their gradients.
#[derive(Clone, Copy, Default)]
pub(super) struct AllPlaces {
    pub factor: Option<Places>,
    pub bias: Option<Places>,
}

impl AllPlaces {
    /// The lengths of the gradients of one head: factor, bias.
    pub fn lens(&self) -> [usize; 2] {
        [self.factor, self.bias].map(|p| p.map_or(0, |p| p.len()))
    }
}

impl<'a, T: Float> Terms<'a, T> {
    fn factor_places(&self) -> Option<Places> {
        self.factor.map(|factor| {
            let kind = match factor.table {
                FactorTable::Dense { side, .. } => Kind::Dense(side),
                FactorTable::Distance { grid, .. } => Kind::Distance(grid),
            };
            Places { kind, prefix: factor.prefix as u32 }
        })
    }

    pub(super) fn places(&self, grads: &TermGradients<T>) -> AllPlaces {
        AllPlaces {
            factor: grads.factor.as_ref().and_then(|_| self.factor_places()),
            bias: grads.bias.as_ref().and(self.bias.as_ref()).map(|bias| Places::dense(bias.side)),
        }
    }

    /// The room that [`head`](Self::head) needs.
    pub(super) fn room(&self) -> usize {
        match self.factor {
            Some(Factor { table: FactorTable::Distance { .. }, .. }) => self.factor_places().map_or(0, |p| p.len()),
            _ => 0,
        }
    }

    /// The terms of head `a`; a table of distances is mirrored into `room`.
    pub(super) fn head<'s>(&self, a: usize, room: &'s mut [T]) -> HeadTerms<'s, T>
    where
        'a: 's,
    {
        let factor = self.factor.zip(self.factor_places()).map(|(factor, places)| {
            let data: &'s [T] = match factor.table {
                FactorTable::Dense { data, shared: true, .. } => data,
                FactorTable::Dense { data, side, .. } => &data[a * side * side..(a + 1) * side * side],
                FactorTable::Distance { data, grid: [h, w] } => {
                    let rows = data[a * h * w..(a + 1) * h * w].chunks_exact(w);
                    for (to, from) in room.chunks_exact_mut(2 * w - 1).zip(rows) {
                        for (dx, &x) in from.iter().enumerate() {
                            to[w - 1 + dx] = x;
                            to[w - 1 - dx] = x;
                        }
                    }
                    room
                }
            };
            HeadTable { data, places }
        });
        let bias = self
            .bias
            .map(|Bias { data, side }| HeadTable { data: &data[a * side * side..(a + 1) * side * side], places: Places::dense(side) });
        HeadTerms { factor, bias, mask: None, all_masks: self.mask }
    }
}

/// The terms of one head.
#[derive(Clone, Copy)]
pub(super) struct HeadTerms<'a, T> {
    pub factor: Option<HeadTable<'a, T>>,
    bias: Option<HeadTable<'a, T>>,
    mask: Option<HeadTable<'a, T>>,
    all_masks: Option<Mask<'a, T>>,
}

impl<T: Float> HeadTerms<'_, T> {
    /// With the mask of a group of an image, given their running number.
    pub fn with_mask(mut self, number: usize) -> Self {
        self.mask = self.all_masks.map(|Mask { data, count, side }| {
            let at = number % count * side * side;
            HeadTable { data: &data[at..at + side * side], places: Places::dense(side) }
        });
        self
    }

    /// The scores of one query → logits.
    #[inline(always)]
    fn apply<V: Vector<T>>(&self, row: &mut [T], query: u32, keys: Keys, line: &mut [T]) {
        if let Some(factor) = &self.factor {
            with_line::<T, V>(row, factor.line(query, keys, line), |x, f| x * f);
        }
        for term in [&self.bias, &self.mask].into_iter().flatten() {
            with_line::<T, V>(row, term.line(query, keys, line), |x, a| x + a);
        }
    }
}

#[inline(always)]
fn with_line<T: Float, V: Vector<T>>(row: &mut [T], line: &[T], f: impl Fn(V, V) -> V) {
    let mut j = 0;
    while j < row.len() {
        put(f(get::<T, V>(row, j, T::ZERO), get::<T, V>(line, j, T::ZERO)), row, j);
        j += LANES;
    }
}

/// How the exponentials of a row are centred and scaled.
pub(super) enum Centre<'a, T> {
    /// By the running maximum of the online softmax. Per row: maximum and sum so far, and the factor by which earlier results must
    /// shrink.
    Running(&'a mut [[T; 3]]),
    /// By the known `m` and `1/Σ`, per row.
    Known(&'a [T]),
}

/// Scores of some queries → exponentials.
pub(super) struct Scores<'a, T> {
    pub scores: &'a mut [T],
    pub terms: &'a HeadTerms<'a, T>,
    pub queries: &'a [u32],
    pub keys: Keys<'a>,
    /// Room for one row.
    pub line: &'a mut [T],
    /// Receives the scores before the terms.
    pub raw: Option<&'a mut [T]>,
    pub centre: Centre<'a, T>,
}

impl<T: Float> Kernel<T> for Scores<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(mut self) {
        let n = self.keys.positions.len();
        for (i, (row, &query)) in self.scores.chunks_exact_mut(n).zip(self.queries).enumerate() {
            if let Some(raw) = &mut self.raw {
                raw[i * n..(i + 1) * n].copy_from_slice(row);
            }
            self.terms.apply::<V>(row, query, self.keys, self.line);
            let (max, inverse) = match &self.centre {
                Centre::Known(stats) => (stats[2 * i], stats[2 * i + 1]),
                Centre::Running(state) => {
                    let mut best = V::splat(T::NEG_INFINITY);
                    let mut j = 0;
                    while j < n {
                        best = get::<T, V>(row, j, T::NEG_INFINITY).max(best);
                        j += LANES;
                    }
                    (best.largest().larger(state[i][0]), T::ONE)
                }
            };
            let (center, scale, mut sum) = (V::splat(max), V::splat(inverse), V::splat(T::ZERO));
            let mut j = 0;
            while j < n {
                let e = exp_of_softmax::<T, V>(get::<T, V>(row, j, T::NEG_INFINITY) - center);
                sum = sum + e;
                put(e * scale, row, j);
                j += LANES;
            }
            if let Centre::Running(state) = &mut self.centre {
                let [before, total, _] = state[i];
                let shrink = if before == max || before == T::NEG_INFINITY { T::ONE } else { V::splat(before - max).exp().to_array()[0] };
                state[i] = [max, total.fused(shrink, sum.sum()), shrink];
            }
        }
    }
}

/// `dZ = P ⊙ (dP − δ)`, `dA = Σ dZ`, `dF = Σ dZ ⊙ S`, `dS = dZ ⊙ F`, where P was. Overwrites dP.
pub(super) struct ScoreGradient<'a, T> {
    pub p: &'a mut [T],
    pub dp: &'a mut [T],
    pub delta: &'a [T],
    pub terms: &'a HeadTerms<'a, T>,
    pub queries: &'a [u32],
    pub keys: Keys<'a>,
    /// Room for one row.
    pub line: &'a mut [T],
    /// S, where there is a factor.
    pub raw: &'a [T],
    pub places: AllPlaces,
    /// The gradients of one head's tables.
    pub d_factor: &'a mut [T],
    pub d_bias: &'a mut [T],
}

impl<T: Float> Kernel<T> for ScoreGradient<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let n = self.keys.positions.len();
        let rows = self.p.chunks_exact_mut(n).zip(self.dp.chunks_exact_mut(n));
        for (i, ((p, dp), (&delta, &query))) in rows.zip(self.delta.iter().zip(self.queries)).enumerate() {
            let delta = V::splat(delta);
            with_line::<T, V>(p, dp, |p, dp| p * (dp - delta));
            if let Some(bias) = &self.places.bias {
                bias.visit(query, self.keys, |at, j, len| add_run(self.d_bias, at, &p[j..j + len]));
            }
            if let Some(factor) = &self.terms.factor {
                if let Some(places) = &self.places.factor {
                    dp.copy_from_slice(p);
                    with_line::<T, V>(dp, &self.raw[i * n..(i + 1) * n], |dz, s| dz * s);
                    places.visit(query, self.keys, |at, j, len| add_run(self.d_factor, at, &dp[j..j + len]));
                }
                with_line::<T, V>(p, factor.line(query, self.keys, self.line), |dz, f| dz * f);
            }
        }
    }
}

#[inline(always)]
fn add_run<T: Float>(table: &mut [T], at: Option<usize>, run: &[T]) {
    if let Some(at) = at {
        for (total, &x) in table[at..at + run.len()].iter_mut().zip(run) {
            *total += x;
        }
    }
}

/// Adds the tables of all tasks, `[images, heads, tasks, factor and bias]`, to the gradients, in order.
pub(super) fn reduce<T: Float>(
    tables: &Buffer<T>,
    places: &AllPlaces,
    grads: TermGradients<T>,
    terms: &Terms<T>,
    [batch, heads, tasks]: [usize; 3],
) {
    let [factor_len, bias_len] = places.lens();
    let width = factor_len + bias_len;
    let of_head = |a: usize| {
        (0..batch * tasks).map(move |i| ((i / tasks * heads + a) * tasks + i % tasks) * width).map(|from| &tables[from..from + width])
    };
    if let (Some(d_bias), Some(_)) = (grads.bias, places.bias) {
        for (a, d) in d_bias.chunks_exact_mut(bias_len).enumerate() {
            of_head(a).for_each(|part| crate::kernel::elementwise::add(d, &part[factor_len..]));
        }
    }
    let (Some(d_factor), Some(factor), Some(_)) = (grads.factor, terms.factor, places.factor) else { return };
    for a in 0..heads {
        of_head(a).for_each(|part| factor.add_head(d_factor, a, &part[..factor_len]));
    }
}

impl<T: Float> Factor<'_, T> {
    /// Adds the gradient of one head's table, as the kernels gather it, to that of the values.
    fn add_head(&self, d_factor: &mut [T], a: usize, part: &[T]) {
        match self.table {
            FactorTable::Dense { shared: true, .. } => crate::kernel::elementwise::add(d_factor, part),
            FactorTable::Dense { .. } => crate::kernel::elementwise::add(&mut d_factor[a * part.len()..(a + 1) * part.len()], part),
            FactorTable::Distance { grid: [h, w], .. } => {
                let rows = d_factor[a * h * w..(a + 1) * h * w].chunks_exact_mut(w);
                for (d, part) in rows.zip(part.chunks_exact(2 * w - 1)) {
                    d[0] += part[w - 1];
                    for dx in 1..w {
                        d[dx] += part[w - 1 + dx] + part[w - 1 - dx];
                    }
                }
            }
        }
    }
}

/// A [`Factor`] for a kernel of its own scores: all heads' tables, all tokens queries and keys in order.
pub(crate) struct AllHeads<'a, T: Float> {
    factor: Factor<'a, T>,
    places: Places,
    mirrored: Buffer<T>,
    positions: Vec<u32>,
    heads: usize,
}

/// Which scores a block holds: rows `stride` apart, of queries from `query` on and `keys` keys from `key` on.
#[derive(Clone, Copy)]
pub(crate) struct ScoreBlock {
    pub stride: usize,
    pub query: usize,
    pub key: usize,
    pub keys: usize,
}

impl<'a, T: Float> AllHeads<'a, T> {
    pub fn new(factor: Factor<'a, T>, heads: usize, tokens: usize) -> Option<Self> {
        let terms = Terms { factor: Some(factor), bias: None, mask: None };
        let (places, room) = (terms.factor_places()?, terms.room());
        let mut mirrored = Buffer::scratch(heads * room);
        for (a, room) in mirrored.chunks_exact_mut(room.max(1)).enumerate() {
            terms.head(a, room);
        }
        Some(AllHeads { factor, places, mirrored, positions: (0..tokens as u32).collect(), heads })
    }

    fn table(&self, a: usize) -> HeadTable<'_, T> {
        let data = match self.factor.table {
            FactorTable::Dense { data, shared: true, .. } => data,
            FactorTable::Dense { data, side, .. } => &data[a * side * side..(a + 1) * side * side],
            FactorTable::Distance { .. } => &self.mirrored[a * self.places.len()..(a + 1) * self.places.len()],
        };
        HeadTable { data, places: self.places }
    }

    /// The length of the gradients of all heads' tables.
    pub fn grads_len(&self) -> usize {
        self.heads * self.places.len()
    }

    /// Scores of head `a`, times F. `line` has room for one row.
    pub fn multiply(&self, scores: &mut [T], a: usize, block: ScoreBlock, line: &mut [T]) {
        T::dispatch(FactorScores { all: self, x: scores, raw: None, d_tables: &mut [], a, block, line });
    }

    /// `dF += dZ ⊙ S`, `dS = dZ ⊙ F`, where dZ was; `d_tables` are the gradients of all heads' tables.
    pub fn pull_back(&self, dz: &mut [T], scores: &[T], d_tables: &mut [T], a: usize, block: ScoreBlock, line: &mut [T]) {
        T::dispatch(FactorScores { all: self, x: dz, raw: Some(scores), d_tables, a, block, line });
    }

    /// Adds the gradients of all heads' tables to those of the values.
    pub fn add_to(&self, d_factor: &mut [T], d_tables: &[T]) {
        for (a, part) in d_tables.chunks_exact(self.places.len().max(1)).enumerate() {
            self.factor.add_head(d_factor, a, part);
        }
    }
}

struct FactorScores<'a, 'b, T: Float> {
    all: &'a AllHeads<'b, T>,
    x: &'a mut [T],
    raw: Option<&'a [T]>,
    d_tables: &'a mut [T],
    a: usize,
    block: ScoreBlock,
    line: &'a mut [T],
}

impl<T: Float> Kernel<T> for FactorScores<'_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let FactorScores { all, x, raw, d_tables, a, block, line } = self;
        let (table, len) = (all.table(a), all.places.len());
        let keys = Keys { positions: &all.positions[block.key..block.key + block.keys], run: true };
        for (i, row) in x.chunks_mut(block.stride).enumerate() {
            let (query, row) = ((block.query + i) as u32, &mut row[..block.keys]);
            if let Some(raw) = raw {
                line[..block.keys].copy_from_slice(&raw[i * block.stride..i * block.stride + block.keys]);
                with_line::<T, V>(&mut line[..block.keys], row, |s, dz| s * dz);
                let d_table = &mut d_tables[a * len..(a + 1) * len];
                all.places.visit(query, keys, |at, j, n| add_run(d_table, at, &line[j..j + n]));
            }
            with_line::<T, V>(row, table.line(query, keys, line), |x, f| x * f);
        }
    }
}
