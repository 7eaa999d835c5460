//! The rows of a batch of images, cut into pieces that threads take: by shape, never by the number of threads.

/// A run of rows of one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The image.
    pub image: usize,
    /// The first row, in the image.
    pub first: usize,
    /// The number of rows.
    pub rows: usize,
}

/// All rows of a batch, in order.
#[derive(Clone, Debug)]
pub struct Pieces {
    list: Vec<Piece>,
    per_image: usize,
}

impl Pieces {
    /// Cuts each image of `rows` rows into at most `most` pieces of about equal length, of at least `least` rows where there are as
    /// many. No pieces if there are no rows.
    pub fn new(images: usize, rows: usize, least: usize, most: usize) -> Pieces {
        let per_image = (rows / least.max(1)).clamp(usize::from(rows > 0), most);
        let cut = |i: usize| rows * i / per_image;
        let list =
            (0..images).flat_map(|image| (0..per_image).map(move |i| Piece { image, first: cut(i), rows: cut(i + 1) - cut(i) })).collect();
        Pieces { list, per_image }
    }

    /// The pieces.
    pub fn iter(&self) -> impl Iterator<Item = Piece> {
        self.list.iter().copied()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Pieces per image.
    pub fn per_image(&self) -> usize {
        self.per_image
    }

    /// The part of each piece of a matrix with `width` columns and all rows of the batch.
    pub fn deal<'a, T>(&self, mut data: &'a mut [T], width: usize) -> impl Iterator<Item = &'a mut [T]> {
        self.list.iter().map(move |piece| {
            let (part, rest) = std::mem::take(&mut data).split_at_mut(piece.rows * width);
            data = rest;
            part
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_dealt_once() {
        for (images, rows) in [(0, 5), (1, 0), (1, 1), (3, 7), (2, 1000)] {
            let pieces = Pieces::new(images, rows, 3, 4);
            let mut data = vec![0; images * rows * 2];
            pieces.deal(&mut data, 2).for_each(|part| part.iter_mut().for_each(|x| *x += 1));
            assert!(data.iter().all(|&x| x == 1));
            assert_eq!(pieces.len(), images * pieces.per_image());
            assert!(pieces.iter().all(|p| p.rows >= 3.min(rows)), "{pieces:?}");
        }
    }
}
