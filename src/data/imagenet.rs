//! The 1000 classes of ILSVRC-2012, in the order of published classifiers: that of their WordNet numbers.
//!
//! Russakovsky et al., *ImageNet large scale visual recognition challenge*, IJCV 2015; the names are WordNet's.

use std::sync::LazyLock;

/// How many classes there are.
pub const CLASSES: usize = 1000;

/// Number (such as `n01440764`) and name of every class.
static TABLE: LazyLock<Vec<(&str, &str)>> =
    LazyLock::new(|| include_str!("../../fixtures/imagenet-classes.txt").lines().filter_map(|line| line.split_once(' ')).collect());

/// The classes' names.
pub fn names() -> impl ExactSizeIterator<Item = &'static str> {
    TABLE.iter().map(|(_, name)| *name)
}

/// The class with the WordNet number `synset`, which is how ImageNet's folders are called.
pub fn class_of(synset: &str) -> Option<usize> {
    TABLE.binary_search_by_key(&synset, |(number, _)| number).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every line is read, in order (the search relies on it), and known classes have their published index.
    #[test]
    fn the_table_is_whole() {
        assert_eq!(names().len(), CLASSES);
        assert!(TABLE.is_sorted_by(|a, b| a.0 < b.0));
        assert!(TABLE.iter().all(|(number, name)| number.len() == 9 && number.starts_with('n') && !name.is_empty()));
        for (number, class, name) in [("n01440764", 0, "tench"), ("n02123045", 281, "tabby"), ("n15075141", 999, "toilet tissue")] {
            assert_eq!((class_of(number), names().nth(class)), (Some(class), Some(name)));
        }
        assert_eq!(class_of("n00000000"), None);
    }
}
