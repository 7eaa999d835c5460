//! How often a classifier is right, and what it takes for what.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// How many classes come before `class`: 0 is right. Of equal logits the lower class comes first; logits that are no numbers come before
/// all others, and what is not finite is never right.
pub fn rank(logits: &[f32], class: usize) -> Option<usize> {
    let own = logits.get(class).filter(|z| z.is_finite())?;
    Some(logits.iter().enumerate().filter(|&(other, z)| z > own || z == own && other < class || z.is_nan()).count())
}

/// Tallies of classified images.
#[derive(Clone, Debug, Default)]
pub struct Accuracy {
    images: usize,
    top1: usize,
    top5: usize,
    /// Images by (true class, predicted class); pairs that do not occur are absent.
    confusion: BTreeMap<(usize, usize), usize>,
}

impl Accuracy {
    /// Counts one image: its logits and its class. Of equal logits, the lower class is preferred.
    ///
    /// # Errors
    /// If there is no such class.
    pub fn add(&mut self, logits: &[f32], class: usize) -> Result<()> {
        if class >= logits.len() {
            return Err(Error::value("class", format!("{class}, expected less than {}", logits.len())));
        }
        let rank = rank(logits, class);
        let best = logits.iter().enumerate().fold(0, |best, (other, &z)| if z > logits[best] { other } else { best });
        self.images += 1;
        self.top1 += usize::from(rank == Some(0));
        self.top5 += usize::from(rank.is_some_and(|rank| rank < 5));
        *self.confusion.entry((class, best)).or_default() += 1;
        Ok(())
    }

    /// Images counted.
    pub fn images(&self) -> usize {
        self.images
    }

    /// The fraction of images whose class has the largest logit.
    pub fn top1(&self) -> f64 {
        self.top1 as f64 / self.images.max(1) as f64
    }

    /// The fraction of images whose class is among the five largest logits.
    pub fn top5(&self) -> f64 {
        self.top5 as f64 / self.images.max(1) as f64
    }

    /// Images by (true class, predicted class).
    pub fn confusion(&self) -> &BTreeMap<(usize, usize), usize> {
        &self.confusion
    }

    /// Images of each class that occurs, and how many of them were classified right.
    pub fn by_class(&self) -> BTreeMap<usize, (usize, usize)> {
        let mut all: BTreeMap<usize, (usize, usize)> = BTreeMap::new();
        for (&(class, predicted), &count) in &self.confusion {
            let (images, right) = all.entry(class).or_default();
            *images += count;
            *right += if class == predicted { count } else { 0 };
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_counted() {
        let mut accuracy = Accuracy::default();
        let logits = [0.0, 6.0, 5.0, 4.0, 3.0, 2.0, 2.0];
        for class in [1, 5, 6, 0, 1] {
            accuracy.add(&logits, class).unwrap();
        }
        // Class 5 is the fifth; class 6 has the same logit but comes after it.
        assert_eq!((accuracy.images(), accuracy.top1(), accuracy.top5()), (5, 0.4, 0.6));
        assert_eq!(accuracy.confusion()[&(1, 1)], 2);
        assert_eq!(accuracy.by_class()[&1], (2, 2));
        assert_eq!(accuracy.by_class()[&5], (1, 0));
        assert!(accuracy.add(&logits, 7).unwrap_err().to_string().contains("less than 7"));
        assert_eq!(Accuracy::default().top1(), 0.0);
    }
}
