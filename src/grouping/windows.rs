//! Windows over visible tokens.

use crate::error::{Error, Result};

/// The non-empty windows of a (shifted) window partition, as compressed rows: window `i` holds the tokens
/// `tokens[offsets[i]..offsets[i + 1]]`.
///
/// With window side `M` and shift `s` along an axis (rows and columns each have their own), and `o = (M - s) mod M`, a token at
/// `(y, x)` belongs to window `(⌊(y + o) / M⌋, ⌊(x + o) / M⌋)`. This is Swin's shifted partition with its wrapped windows cut
/// apart: what Swin rolls and then masks is here simply another, smaller window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Start of each window in `tokens`, and the number of tokens at the end.
    pub offsets: Vec<u32>,
    /// Token indices: windows in row-major order, tokens ascending inside a window.
    pub tokens: Vec<u32>,
    /// Position of each entry of `tokens` inside its window: `((y + o) mod M_rows) · M_cols + (x + o) mod M_cols`.
    pub positions: Vec<u32>,
    /// Window `(row, column)` of each token, in token order.
    pub yx: Vec<[u32; 2]>,
}

impl Windows {
    /// The windows of the tokens at `coords` (`(y, x)` of token 0, 1, …); `window` and `shift` are (rows, columns).
    ///
    /// # Errors
    /// If a window side is 0 or above 32768, a shift is not smaller than its window side, or a coordinate or the number of tokens
    /// does not fit in 31 bits.
    pub fn new(coords: &[[usize; 2]], window: (usize, usize), shift: (usize, usize)) -> Result<Windows> {
        const LIMIT: usize = i32::MAX as usize;
        if coords.len() > LIMIT {
            return Err(Error::value("coords", format!("{} tokens; expected at most {LIMIT}", coords.len())));
        }
        if let Some((i, [y, x])) = coords.iter().enumerate().find(|(_, [y, x])| *y.max(x) > LIMIT) {
            return Err(Error::value(format!("coords[{i}]"), format!("({y}, {x}); expected coordinates up to {LIMIT}")));
        }
        let (row, column) = (Axis::new(window.0, shift.0)?, Axis::new(window.1, shift.1)?);
        let yx: Vec<[u32; 2]> = coords.iter().map(|&[y, x]| [row.window(y), column.window(x)]).collect();
        let mut tokens: Vec<u32> = (0..coords.len() as u32).collect();
        tokens.sort_by_key(|&t| yx[t as usize]);

        let mut offsets = vec![0];
        offsets.extend((1..tokens.len()).filter(|&k| yx[tokens[k] as usize] != yx[tokens[k - 1] as usize]).map(|k| k as u32));
        if !tokens.is_empty() {
            offsets.push(tokens.len() as u32);
        }
        let position = |&t: &u32| {
            let [y, x] = coords[t as usize];
            row.local(y) * window.1 as u32 + column.local(x)
        };
        let positions = tokens.iter().map(position).collect();
        Ok(Windows { offsets, tokens, positions, yx })
    }

    /// The windows of a whole `height × width` grid in row-major order, every token visible. Attention inside these windows is
    /// Swin's shifted-window attention without roll and mask, where the window sides divide height and width.
    ///
    /// # Errors
    /// As [`Windows::new`].
    pub fn dense(height: usize, width: usize, window: (usize, usize), shift: (usize, usize)) -> Result<Windows> {
        if height.checked_mul(width).is_none_or(|tokens| tokens > i32::MAX as usize) {
            return Err(Error::value("grid", format!("{height} x {width} tokens; expected at most {}", i32::MAX)));
        }
        let coords: Vec<_> = (0..height).flat_map(|y| (0..width).map(move |x| [y, x])).collect();
        Windows::new(&coords, window, shift)
    }

    /// Number of non-empty windows.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there is no window at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Visible tokens of each window.
    pub fn sizes(&self) -> Vec<usize> {
        self.offsets.windows(2).map(|pair| (pair[1] - pair[0]) as usize).collect()
    }

    /// The entries of `tokens` and `positions` that belong to window `i`.
    ///
    /// # Panics
    /// If `i` is not below [`Windows::len`].
    pub fn range(&self, i: usize) -> std::ops::Range<usize> {
        self.offsets[i] as usize..self.offsets[i + 1] as usize
    }
}

/// One axis of the partition.
struct Axis {
    side: usize,
    offset: usize,
}

impl Axis {
    fn new(side: usize, shift: usize) -> Result<Axis> {
        // (2M - 1)² relative positions have to fit in 32 bits.
        if side == 0 || side > 1 << 15 {
            return Err(Error::config("window_size", format!("{side}; expected 1 to {}", 1 << 15)));
        }
        if shift >= side {
            return Err(Error::config("shift_size", format!("{shift}; expected less than the window size {side}")));
        }
        Ok(Axis { side, offset: (side - shift) % side })
    }

    fn window(&self, at: usize) -> u32 {
        ((at + self.offset) / self.side) as u32
    }

    fn local(&self, at: usize) -> u32 {
        ((at + self.offset) % self.side) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shifted_windows_of_a_small_map() {
        let found = Windows::dense(4, 4, (2, 4), (1, 0)).unwrap();
        assert_eq!(found.sizes(), [4, 8, 4]);
        assert_eq!(found.offsets, [0, 4, 12, 16]);
        assert_eq!(found.tokens, (0..16).collect::<Vec<_>>());
        assert_eq!(found.positions, [4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]);
        assert_eq!((found.yx[3], found.yx[4], found.range(2)), ([0, 0], [1, 0], 12..16));
    }

    #[test]
    fn no_token_no_window() {
        let none = Windows::new(&[], (7, 7), (3, 3)).unwrap();
        assert!(none.is_empty() && none.sizes().is_empty() && none.offsets == [0]);
        assert!(Windows::dense(0, 9, (3, 3), (0, 0)).unwrap().is_empty());
    }

    #[test]
    fn hostile_input_is_refused() {
        assert!(Windows::new(&[[0, 0]], (0, 3), (0, 0)).unwrap_err().to_string().contains("window_size"));
        assert!(Windows::new(&[[0, 0]], (3, 3), (0, 3)).unwrap_err().to_string().contains("shift_size"));
        assert!(Windows::new(&[[0, usize::MAX]], (3, 3), (0, 1)).unwrap_err().to_string().contains("coords[0]"));
        assert!(Windows::dense(usize::MAX, 2, (3, 3), (0, 0)).is_err());
    }
}
