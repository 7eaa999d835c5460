//! `tokenizer.bpe`: byte-pair encoding, which stands in for CogView's SentencePiece model.
//!
//! Text is bytes, cut into chunks before every space (32) and newline (10); merges never cross chunks. Training counts adjacent pairs
//! (every adjacent position, overlapping ones too), merges the most frequent one, of several the smallest, left to right, and goes on
//! until the vocabulary is full or no pair occurs twice. Ids 0–255 are bytes, merge r makes 256 + r. Encoding applies the earliest
//! merge present, again and again.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};

use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor};

type Pair = (u32, u32);

/// A trained vocabulary.
#[derive(Clone, Debug, Default)]
pub struct Bpe {
    merges: Vec<Pair>,
    ranks: HashMap<Pair, u32>,
}

/// The chunks of a text.
fn chunks(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.chunk_by(|_, &next| next != b' ' && next != b'\n')
}

/// Replaces every occurrence of `pair`, left to right, by `id`.
fn merge(word: &mut Vec<u32>, pair: Pair, id: u32) {
    let (mut read, mut write) = (0, 0);
    while read < word.len() {
        let found = read + 1 < word.len() && (word[read], word[read + 1]) == pair;
        word[write] = if found { id } else { word[read] };
        read += 1 + usize::from(found);
        write += 1;
    }
    word.truncate(write);
}

/// How often each pair occurs, and in which words; the most frequent one at hand.
#[derive(Default)]
struct Counts {
    of: HashMap<Pair, (u64, BTreeSet<usize>)>,
    order: BTreeSet<(Reverse<u64>, Pair)>,
}

impl Counts {
    /// Counts (or, with `forget`, no longer counts) the pairs of a word that occurs `times`.
    fn update(&mut self, index: usize, word: &[u32], times: u64, forget: bool) {
        for pair in word.windows(2).map(|w| (w[0], w[1])) {
            let (count, words) = self.of.entry(pair).or_default();
            self.order.remove(&(Reverse(*count), pair));
            if forget {
                *count -= times;
                words.remove(&index);
            } else {
                *count += times;
                words.insert(index);
            }
            if *count > 0 {
                self.order.insert((Reverse(*count), pair));
            }
        }
    }
}

impl Bpe {
    /// Learns merges from `corpus` until there are `vocab_size` ids.
    pub fn train(corpus: &[u8], vocab_size: usize) -> Result<Bpe> {
        if vocab_size < 256 {
            return Err(Error::config("vocab_size", format!("expected at least the 256 bytes, found {vocab_size}")));
        }
        let mut occurrences: HashMap<&[u8], u64> = HashMap::new();
        chunks(corpus).for_each(|chunk| *occurrences.entry(chunk).or_default() += 1);
        let mut words: Vec<(Vec<u32>, u64)> =
            occurrences.into_iter().map(|(chunk, times)| (chunk.iter().map(|&b| u32::from(b)).collect(), times)).collect();
        words.sort_unstable();
        let mut counts = Counts::default();
        for (index, (word, times)) in words.iter().enumerate() {
            counts.update(index, word, *times, false);
        }
        let mut bpe = Bpe::default();
        while bpe.merges.len() < vocab_size - 256 {
            let Some(&(Reverse(count), pair)) = counts.order.first() else { break };
            if count < 2 {
                break;
            }
            let id = 256 + bpe.merges.len() as u32;
            let touched: Vec<usize> = counts.of[&pair].1.iter().copied().collect();
            for index in touched {
                let (word, times) = &mut words[index];
                counts.update(index, word, *times, true);
                merge(word, pair, id);
                counts.update(index, word, *times, false);
            }
            bpe.ranks.insert(pair, bpe.merges.len() as u32);
            bpe.merges.push(pair);
        }
        Ok(bpe)
    }

    /// The merges, in order.
    pub fn merges(&self) -> &[(u32, u32)] {
        &self.merges
    }

    /// Text to ids.
    pub fn encode(&self, text: &[u8]) -> Vec<u32> {
        let mut ids = Vec::new();
        for chunk in chunks(text) {
            let mut word: Vec<u32> = chunk.iter().map(|&b| u32::from(b)).collect();
            while let Some(&rank) = word.windows(2).filter_map(|w| self.ranks.get(&(w[0], w[1]))).min() {
                merge(&mut word, self.merges[rank as usize], 256 + rank);
            }
            ids.append(&mut word);
        }
        ids
    }

    /// Ids to text; an error for an id that is not in the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>> {
        let (mut text, mut open) = (Vec::new(), Vec::new());
        for &id in ids {
            open.push(id);
            while let Some(id) = open.pop() {
                match id.checked_sub(256).map(|rank| self.merges.get(rank as usize)) {
                    None => text.push(id as u8),
                    Some(Some(&(left, right))) => open.extend([right, left]),
                    Some(None) => return Err(Error::value("ids", format!("expected less than {}, found {id}", 256 + self.merges.len()))),
                }
            }
        }
        Ok(text)
    }
}

fn bytes(what: &str, text: &IntTensor) -> Result<Vec<u8>> {
    let [_] = text.shape.dims(what)?;
    text.data.iter().map(|&b| u8::try_from(b).map_err(|_| Error::value(what, format!("expected bytes, found {b}")))).collect()
}

/// `tokenizer.bpe`.
pub struct BpeOp;

impl Operation for BpeOp {
    const NAME: &'static str = "tokenizer.bpe";
    const PAPER: &'static str = "2105.13290 CogView";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("vocab_size", 256 + rng.below(20));
        config
    }

    fn inputs(_: &Config, draw: &mut Draw) -> Result<()> {
        for (name, most) in [("corpus", 80), ("text", 30)] {
            let length = draw.rng.below(most);
            let letters = b"aab c\n";
            let text = (0..length).map(|_| i64::from(letters[draw.rng.below(letters.len())])).collect();
            draw.ints(name, [length], text)?;
        }
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let (corpus, text) = (bytes("input `corpus`", run.ints("corpus")?)?, bytes("input `text`", run.ints("text")?)?);
        let bpe = Bpe::train(&corpus, run.config().usize("vocab_size")?)?;
        let merges: Vec<i64> = bpe.merges.iter().flat_map(|&(a, b)| [i64::from(a), i64::from(b)]).collect();
        run.output_ints("merges", IntTensor::new([merges.len() / 2, 2], merges)?);
        run.output_ints("ids", IntTensor::vector(bpe.encode(&text).into_iter().map(|id| id as usize)));
        run.backward();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoding_undoes_encoding() {
        let corpus = b"a red circle at the centre on white\na red square at the top on red\n  two  spaces";
        let bpe = Bpe::train(corpus, 300).unwrap();
        assert!(bpe.merges().len() > 10);
        for text in [&corpus[..], b"", b" ", b"a red red red square", &[0, 255, 32, 32, 10, 200]] {
            let ids = bpe.encode(text);
            assert_eq!(bpe.decode(&ids).unwrap(), text);
        }
        assert!(bpe.encode(corpus).len() + bpe.merges().len() < corpus.len());
        assert!(bpe.decode(&[1000]).is_err());
    }

    #[test]
    fn overlapping_pairs_count_and_merge_left_to_right() {
        let bpe = Bpe::train(b"aaa", 257).unwrap();
        assert_eq!(bpe.merges(), [(97, 97)]);
        assert_eq!(bpe.encode(b"aaaaa"), [256, 256, 97]);
    }
}
