//! `lm.cogview_sequence`: caption and image codes as one sequence of tokens; `lm.cogview_positions`: their position ids.
//!
//! Image codes are 0 … n_img − 1, text tokens follow, then 27 [`Command`]s.

use crate::case::{Config, Draw, Operation, Run};
use crate::error::{Error, Result};
use crate::tensor::random::Rng;
use crate::tensor::{Float, IntTensor};

/// A command token, counted from n_img + n_txt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Command {
    /// Fills a sequence up.
    Pad = 0,
    /// Begins an image; its second and third.
    Boi1 = 1,
    /// See [`Boi1`](Command::Boi1).
    Boi2 = 2,
    /// See [`Boi1`](Command::Boi1).
    Boi3 = 3,
    /// Ends an image.
    Eoi1 = 4,
    /// See [`Eoi1`](Command::Eoi1).
    Eoi2 = 5,
    /// See [`Eoi1`](Command::Eoi1).
    Eoi3 = 6,
    /// Refers to an image or its caption.
    Roi1 = 7,
    /// See [`Roi1`](Command::Roi1).
    Roi2 = 8,
    /// See [`Roi1`](Command::Roi1).
    Roi3 = 9,
    /// Separates.
    Sep = 10,
    /// Masks.
    Mask = 11,
    /// Class.
    Cls = 12,
    /// Encodes.
    Enc = 13,
    /// The picture has 8×8 codes.
    Tiny = 14,
    /// 16×16.
    Small = 15,
    /// 32×32.
    Base = 16,
    /// 64×64.
    Big = 17,
    /// The first of nine positions in a larger picture.
    Pos0 = 18,
}

/// Commands, with all nine positions.
pub const COMMANDS: usize = 27;

/// The sizes of the vocabulary.
#[derive(Clone, Copy, Debug)]
pub struct Vocabulary {
    /// Image codes n_img.
    pub image: usize,
    /// Text tokens n_txt.
    pub text: usize,
}

impl Vocabulary {
    /// The token of a command.
    pub fn command(&self, command: Command) -> i64 {
        (self.image + self.text + command as usize) as i64
    }

    /// `ROI1 text size BOI1 codes EOI1`: the sequence that text-to-image models learn. `text` counts from 0.
    pub fn text_to_image(&self, text: &[i64], size: Command, codes: &[i64]) -> Result<Vec<i64>> {
        for (what, ids, limit) in [("input `text_ids`", text, self.text), ("input `codes`", codes, self.image)] {
            if let Some(bad) = ids.iter().find(|&&id| !(0..limit as i64).contains(&id)) {
                return Err(Error::value(what, format!("expected numbers below {limit}, found {bad}")));
            }
        }
        let mut tokens = vec![self.command(Command::Roi1)];
        tokens.extend(text.iter().map(|&t| t + self.image as i64));
        tokens.extend([self.command(size), self.command(Command::Boi1)]);
        tokens.extend_from_slice(codes);
        tokens.push(self.command(Command::Eoi1));
        Ok(tokens)
    }
}

const SIZES: [(&str, Command); 4] = [("TINY", Command::Tiny), ("SMALL", Command::Small), ("BASE", Command::Base), ("BIG", Command::Big)];

/// `lm.cogview_sequence`.
pub struct CogViewSequence;

impl Operation for CogViewSequence {
    const NAME: &'static str = "lm.cogview_sequence";
    const PAPER: &'static str = "2105.13290 CogView";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        config.set("num_image_tokens", rng.between(1, 9)).set("num_text_tokens", rng.between(1, 9));
        config.set("size_token", rng.pick(&["TINY", "SMALL", "BASE", "BIG"])).set("max_len", rng.below(20));
        config
    }

    fn inputs(config: &Config, draw: &mut Draw) -> Result<()> {
        for (name, key) in [("text_ids", "num_text_tokens"), ("codes", "num_image_tokens")] {
            let (length, limit) = (draw.rng.below(7), config.positive(key)?);
            let ids = (0..length).map(|_| draw.rng.below(limit) as i64).collect();
            draw.ints(name, [length], ids)?;
        }
        Ok(())
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let vocabulary = Vocabulary { image: config.usize("num_image_tokens")?, text: config.usize("num_text_tokens")? };
        let size = config.choice("size_token", &SIZES.map(|(name, _)| name))?;
        let size = SIZES.iter().find(|(name, _)| *name == size).map_or(Command::Base, |&(_, command)| command);
        let max_len = config.usize("max_len")?;
        if max_len > 1 << 24 {
            return Err(Error::config("max_len", format!("expected at most {}, found {max_len}", 1 << 24)));
        }
        let (text, codes) = (run.ints("text_ids")?, run.ints("codes")?);
        let ([_], [_]) = (text.shape.dims("input `text_ids`")?, codes.shape.dims("input `codes`")?);
        let mut tokens = vocabulary.text_to_image(&text.data, size, &codes.data)?;
        let mut loss_mask = vec![1; tokens.len()];
        tokens.resize(max_len, vocabulary.command(Command::Pad));
        loss_mask.resize(max_len, 0);
        run.output_ints("tokens", IntTensor::new([max_len], tokens)?);
        run.output_ints("loss_mask", IntTensor::new([max_len], loss_mask)?);
        run.backward();
        Ok(())
    }
}

/// `lm.cogview_positions`. Counting starts again at the second image of a super-resolution sequence, at ROI2.
///
/// `train` and `inference` disagree at that token itself, as in the release: with training's rule it has position 0, with
/// generation's its own index.
pub struct CogViewPositions;

impl Operation for CogViewPositions {
    const NAME: &'static str = "lm.cogview_positions";
    const PAPER: &'static str = "2105.13290 CogView";

    fn sample(rng: &mut Rng) -> Config {
        let mut config = Config::default();
        let rule = rng.pick(&["plain", "train", "inference"]);
        config.set("rule", rule);
        if rule != "plain" {
            config.set("roi2_id", 4);
        }
        if rule == "train" {
            config.set("max_positions", rng.between(1, 12));
        }
        config
    }

    fn inputs(_: &Config, draw: &mut Draw) -> Result<()> {
        let (b, n) = (draw.size("batch", 1, 3), draw.size("tokens", 1, 12));
        let mut tokens: Vec<i64> = (0..b * n).map(|_| draw.rng.below(6) as i64).collect();
        // Every row has an ROI2: the rule of training asks for one.
        tokens.chunks_exact_mut(n).for_each(|row| row[draw.rng.below(n)] = 4);
        draw.ints("tokens", [b, n], tokens)
    }

    fn run<T: Float>(run: &mut Run<T>) -> Result<()> {
        let config = run.config();
        let rule = config.choice("rule", &["plain", "train", "inference"])?;
        let tokens = run.ints("tokens")?;
        let [_, n] = tokens.shape.dims("input `tokens`")?;
        let roi2 = if rule == "plain" { 0 } else { config.usize("roi2_id")? as i64 };
        let most = if rule == "train" { config.positive("max_positions")? } else { 0 };
        let mut ids = Vec::with_capacity(tokens.data.len());
        for row in tokens.data.chunks_exact(n.max(1)) {
            match rule {
                "train" => {
                    let first = row.iter().position(|&t| t == roi2);
                    let first = first.ok_or_else(|| Error::value("input `tokens`", format!("expected the token {roi2} in every row")))?;
                    ids.extend((0..n).map(|i| if i < first { i } else { i - first }.min(most - 1) as i64));
                }
                "inference" => {
                    let last = row.iter().rposition(|&t| t == roi2).unwrap_or(n);
                    ids.extend((0..n).map(|i| if i > last { i - last } else { i } as i64));
                }
                _ => ids.extend(0..n as i64),
            }
        }
        run.output_ints("position_ids", IntTensor::new(tokens.shape, ids)?);
        run.backward();
        Ok(())
    }
}
