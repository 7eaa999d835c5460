//! The logits of a network of the zoo with given weights, for comparison with other implementations (`reference/check_models.py`):
//!
//! `logits --model NAME --weights FILE --images FILE --out FILE [--classes N] [--size N] [--config JSON]`
//!
//! Images are the tensor `images` `[B, 3, H, W]` of a safetensors file, already normalised. The result is the tensor `logits`
//! `[heads, B, classes]`. `--config` replaces keys of the network's configuration: `{"depth": 2}`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use karat::case::Config;
use karat::model::weights;
use karat::model::zoo::Model;
use karat::nn::{Checkpoint, Params};
use karat::{Error, Result};
use safetensors::tensor::{Dtype, TensorView};

const USAGE: &str = "usage: logits --model NAME --weights FILE --images FILE --out FILE [--classes N] [--size N] [--config JSON]";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn options() -> Result<BTreeMap<String, String>> {
    let known = ["model", "weights", "images", "out", "classes", "size", "config"];
    let mut options = BTreeMap::new();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let name = word.strip_prefix("--").filter(|name| known.contains(name));
        let (Some(name), Some(value)) = (name, words.next()) else {
            return Err(Error::usage(format!("`{word}` is no option, or has no value; {USAGE}")));
        };
        options.insert(name.to_string(), value);
    }
    Ok(options)
}

fn run() -> Result<()> {
    let options = options()?;
    let need = |name: &str| options.get(name).ok_or_else(|| Error::usage(format!("--{name} is missing; {USAGE}")));
    let number = |name: &str| match options.get(name).map(|text| (text, text.parse::<usize>())) {
        None => Ok(None),
        Some((_, Ok(n))) => Ok(Some(n)),
        Some((text, Err(_))) => Err(Error::usage(format!("--{name}: expected a number, found `{text}`"))),
    };
    let mut model = Model::named(need("model")?, number("classes")?.unwrap_or(1000), number("size")?)?;
    if let Some(json) = options.get("config") {
        let given = Config::parse(json)?;
        for key in given.keys() {
            if let Some(value) = given.get(key) {
                model.config.set(key, value.clone());
            }
        }
    }
    let built = model.build()?;
    let mut params = Params::zeros(&built.layout);
    let loaded = weights::load(&Checkpoint::open(need("weights")?)?, &model, &mut params, false)?;
    println!("{} tensors not wanted, {} resized", loaded.dropped.len(), loaded.resized.len());
    let images = Checkpoint::open(need("images")?)?.tensor("images")?;
    let logits = built.network.infer(&params, &images)?;
    let [batch, classes] = logits[0].dims("logits")?;
    let bytes: Vec<u8> = logits.iter().flat_map(|z| z.data()).flat_map(|z| z.to_le_bytes()).collect();
    let out = need("out")?;
    let wrong = |e: safetensors::SafeTensorError| Error::format(out, e.to_string());
    let view = TensorView::new(Dtype::F32, vec![logits.len(), batch, classes], &bytes).map_err(wrong)?;
    let file = safetensors::serialize([("logits", view)], None).map_err(wrong)?;
    std::fs::write(out, file).map_err(|e| Error::io(out, e))
}
