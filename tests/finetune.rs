//! The promises of `karat finetune`: exact losses and gradients, the same bits after kill and resume and for any number of threads,
//! networks that learn, and errors that say what is wrong.

use std::fs;
use std::path::Path;

use karat::case::Config;
use karat::data::transform::Normalization;
use karat::data::{Dataset, Split, Transform};
use karat::mim::methods::{self, METHODS};
use karat::nn::{Batch, Checkpoint, Entry, Objective, Params, StepKey, write_tensors};
use karat::tensor::Tensor;
use karat::train::{
    BEST, CHECKPOINT, Classification, Evaluation, Event, FineTune, Length, METRICS, Mix, Mixing, STATE, Teacher, TrainConfig, Trainer,
    finetuning_network, layer_rates, read_accuracies, transfer,
};
const SIZE: usize = 16;

/// A ViT of 4 tokens.
fn tiny(depth: usize) -> Config {
    let mut network = Config::default();
    network.set("embed_dim", 12).set("depth", depth).set("num_heads", 2).set("patch_size", 8).set("mlp_ratio", 2.0);
    network
}

fn settings() -> FineTune {
    FineTune { class_names: (0..10).map(|i| i.to_string()).collect(), network: tiny(2), ..FineTune::default() }
}

/// 11 steps of 5 an epoch, with everything random turned on; saves within epochs.
fn config() -> TrainConfig {
    let finetune = FineTune {
        limit: 42,
        mixup: 0.8,
        cutmix: 1.0,
        randaug: Some((2, 9.0)),
        erasing: 0.25,
        layer_decay: 0.7,
        drop_path: 0.2,
        ema: 0.9,
        recompute: true,
        ..settings()
    };
    TrainConfig {
        image_size: SIZE,
        length: Length::Steps(11),
        batch: 8,
        save_every: 4,
        seed: 3,
        finetune: Some(finetune),
        ..TrainConfig::classification()
    }
}

fn classifier(name: &str, finetune: &FineTune) -> Classification {
    Classification::new(&finetune.model(name, SIZE).unwrap(), finetune).unwrap()
}

/// Trains in `folder`, from the beginning or from its state, for at most `steps` steps as if killed then.
fn train(folder: &Path, config: &TrainConfig, resume: bool, kill_after: Option<u64>) -> karat::Result<()> {
    let finetune = config.finetune.clone().unwrap();
    let classification = classifier(&config.model, &finetune);
    let data = Dataset::builtin(Split::Train)?.balanced(finetune.limit)?;
    let test = Dataset::builtin(Split::Test)?.balanced(30)?;
    let transform = Transform::evaluation(SIZE, 3, SIZE, config.normalization())?;
    let mut trainer = match resume {
        true => Trainer::resume(&classification, &data, &Checkpoint::open(folder.join(STATE))?)?,
        false => Trainer::new(&classification, &data, config.clone())?,
    };
    trainer.evaluate_with(Evaluation::new(&classification, &test, transform)?);
    let run = std::panic::AssertUnwindSafe(|| {
        trainer.run_evaluated(folder, &mut |event| match event {
            Event::Step(r) if Some(r.step) == kill_after => std::panic::resume_unwind(Box::new(())),
            _ => {}
        })
    });
    match std::panic::catch_unwind(run) {
        Ok(result) => result,
        Err(_) => {
            assert!(kill_after.is_some());
            Ok(())
        }
    }
}

/// All files, and all of the metrics but the speed.
fn outcome(folder: &Path) -> (Vec<Vec<u8>>, Vec<String>) {
    let text = fs::read_to_string(folder.join(METRICS)).unwrap();
    let lines = text.lines().map(|line| line.split(",\"images_per_second\"").next().unwrap().to_string());
    ([CHECKPOINT, STATE, BEST].map(|name| fs::read(folder.join(name)).unwrap()).into(), lines.collect())
}

#[test]
fn the_same_bits_for_any_threads_and_after_a_kill() {
    let run = |threads: usize| {
        let folder = tempfile::tempdir().unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| train(folder.path(), &config(), false, None)).unwrap();
        outcome(folder.path())
    };
    let straight = run(1);
    assert_eq!(straight.1.len(), 11 + 3, "{:?}", straight.1);
    assert!(straight == run(2) && straight == run(3));
    // Before the first save; after an evaluation whose state was not saved; in the last step.
    for kill in [2, 6, 11] {
        let folder = tempfile::tempdir().unwrap();
        train(folder.path(), &config(), false, Some(kill)).unwrap();
        train(folder.path(), &config(), true, Some(9.max(kill))).unwrap();
        train(folder.path(), &config(), true, None).unwrap();
        assert!(outcome(folder.path()) == straight, "killed after step {kill}");
    }
    // The moving average is what is saved, and it is not the parameters.
    let folder = tempfile::tempdir().unwrap();
    train(folder.path(), &config(), false, None).unwrap();
    let (checkpoint, state) =
        (Checkpoint::open(folder.path().join(CHECKPOINT)).unwrap(), Checkpoint::open(folder.path().join(STATE)).unwrap());
    let head = |file: &Checkpoint, name: &str| file.tensor(name).unwrap().data().to_vec();
    assert_eq!(head(&checkpoint, "head.weight"), head(&state, "ema.head.weight"));
    assert_ne!(head(&checkpoint, "head.weight"), head(&state, "params.head.weight"));
}

/// The part of each image that comes from its partner is the weight of the partner's label, to the pixel.
#[test]
fn mixed_labels_are_exact() {
    let (b, side) = (5, 9);
    let images = Tensor::from_fn([b, 2, side, side], |i| (i / (2 * side * side)) as f32);
    let (mut blends, mut pastes) = (0, 0);
    for step in 0..60 {
        let mix = Mixing { mixup: 0.8, cutmix: 1.0 }.draw(side, StepKey { seed: 1, step });
        let mixed = mix.apply(&images).unwrap().unwrap();
        let own = mix.own();
        for (i, x) in mixed.data().chunks(2 * side * side).enumerate() {
            let (mine, partner) = (i as f64, (b - 1 - i) as f64);
            match mix {
                Mix::Nothing => panic!("both are on"),
                Mix::Blend(lambda) => {
                    blends += 1;
                    assert!(x.iter().all(|x| (f64::from(*x) - lambda * mine - (1.0 - lambda) * partner).abs() < 1e-6));
                }
                Mix::Paste { .. } if mine != partner => {
                    pastes += 1;
                    let kept = x.iter().filter(|x| f64::from(**x) == mine).count();
                    assert_eq!(kept + x.iter().filter(|x| f64::from(**x) == partner).count(), x.len());
                    assert!((kept as f64 / x.len() as f64 - own).abs() < 1e-12);
                }
                Mix::Paste { .. } => {}
            }
        }
    }
    assert!(blends > 80 && pastes > 80, "{blends} {pastes}");
    let off = Mixing::default().draw(side, StepKey { seed: 1, step: 0 });
    assert!(off.own() == 1.0 && off.apply(&images).unwrap().is_none());

    let t = classifier("vit_micro", &FineTune { smoothing: 0.2, ..settings() }).targets(&[3, 3, 7], 0.75).unwrap();
    let mut want = [[0.02; 10]; 3];
    (want[0][3], want[0][7]) = (0.02 + 0.8 * 0.75, 0.02 + 0.8 * 0.25);
    (want[1][3], want[2][7], want[2][3]) = (0.02 + 0.8, 0.02 + 0.8 * 0.75, 0.02 + 0.8 * 0.25);
    for (got, want) in t.iter().zip(want.as_flattened()) {
        assert!((got - want).abs() < 1e-12, "{t:?}");
    }
}

fn images(b: usize) -> Tensor<f32> {
    Tensor::from_fn([b, 3, SIZE, SIZE], |i| ((i * 37 % 101) as f32 / 50.0) - 1.0)
}

const LABELS: [usize; 3] = [2, 0, 9];

fn loss(objective: &Classification, params: &Params<f32>, grads: Option<&mut Params<f32>>, key: StepKey) -> f64 {
    f64::from(objective.loss(params, grads, Batch { images: &images(3), second: None, labels: &LABELS, key }).unwrap().value)
}

const KEY: StepKey = StepKey { seed: 1, step: 2 };

/// log softmax of one row, from the definition.
fn log_softmax(z: &[f32], tau: f64) -> Vec<f64> {
    let sum: f64 = z.iter().map(|z| (f64::from(*z) / tau).exp()).sum();
    z.iter().map(|z| f64::from(*z) / tau - sum.ln()).collect()
}

#[test]
fn smoothed_loss() {
    let objective = classifier("vit_micro", &settings());
    let params = Params::init(objective.layout(), 4);
    let z = objective.logits(&params, &images(3)).unwrap();
    let row = |i: usize| log_softmax(&z.data()[10 * i..10 * i + 10], 1.0);
    // (1 − ε) of the label's own, ε of the mean over all classes.
    let want: f64 = (0..3).map(|i| -0.9 * row(i)[LABELS[i]] - 0.1 * row(i).iter().sum::<f64>() / 10.0).sum::<f64>() / 3.0;
    let got = loss(&objective, &params, None, KEY);
    assert!((got - want).abs() < 1e-6, "{got} {want}");
}

/// Central differences, for one head with mixed labels and for two with each kind of teacher.
#[test]
fn gradients() {
    let mixed = FineTune { mixup: 0.8, cutmix: 1.0, ..settings() };
    let distilled = |tau| classifier("deit_micro_distilled", &settings()).taught_by(teacher(tau)).unwrap();
    let objectives = [classifier("vit_micro", &mixed), classifier("deit_micro_distilled", &mixed), distilled(None), distilled(Some(2.5))];
    for (which, objective) in objectives.iter().enumerate() {
        let mut params = Params::init(objective.layout(), 4);
        let mut grads = Params::zeros(objective.layout());
        let value = loss(objective, &params, Some(&mut grads), KEY);
        assert_eq!(value, loss(objective, &params, None, KEY), "with and without gradient");
        let scale = grads.flat().iter().fold(0.0f32, |m, g| m.max(g.abs()));
        for at in (5..params.flat().len()).step_by(211) {
            let (old, h) = (params.flat()[at], 4e-3);
            let mut moved = |d: f32| {
                params.flat_mut()[at] = old + d;
                loss(objective, &params, None, KEY)
            };
            let numeric = ((moved(h) - moved(-h)) / f64::from(2.0 * h)) as f32;
            moved(0.0);
            assert!((numeric - grads.flat()[at]).abs() < 0.01 * scale, "{which} {at}: {numeric} {}", grads.flat()[at]);
        }
    }
}

/// A larger network that was never trained; its opinions differ from the labels.
fn teacher(tau: Option<f64>) -> Teacher {
    let lessons = FineTune { network: tiny(3), ..settings() };
    let built = lessons.model("vit_micro", SIZE).unwrap().build().unwrap();
    let mut params = Params::init(&built.layout, 8);
    params.flat_mut().iter_mut().for_each(|x| *x *= 5.0);
    Teacher::new(built, params, tau, lessons.normalization, lessons.normalization)
}

#[test]
fn distillation_losses() {
    let lessons = FineTune { network: tiny(3), ..settings() };
    let own = classifier("vit_micro", &lessons);
    let mut own_params = Params::init(own.layout(), 8);
    own_params.flat_mut().iter_mut().for_each(|x| *x *= 5.0);
    let u = own.logits(&own_params, &images(3)).unwrap();

    // The student's two heads, from a network that counts both alike: its loss without a teacher is the mean of theirs.
    let model = settings().model("deit_micro_distilled", SIZE).unwrap().build().unwrap();
    let params = Params::init(&model.layout, 4);
    let heads = model.network.infer(&params, &images(3)).unwrap();
    let row = |z: &Tensor<f32>, i: usize, tau| log_softmax(&z.data()[10 * i..10 * i + 10], tau);
    let labels =
        |z: &Tensor<f32>| (0..3).map(|i| -0.9 * row(z, i, 1.0)[LABELS[i]] - 0.01 * row(z, i, 1.0).iter().sum::<f64>()).sum::<f64>() / 3.0;
    let alone = classifier("deit_micro_distilled", &settings());
    let check = |got: f64, want: f64| assert!((got - want).abs() < 1e-6, "{got} {want}");
    check(loss(&alone, &params, None, KEY), 0.5 * labels(&heads[0]) + 0.5 * labels(&heads[1]));
    let hard = alone.taught_by(teacher(None)).unwrap();
    let best = |i: usize| (0..10).max_by(|a, b| u.data()[10 * i + a].total_cmp(&u.data()[10 * i + b])).unwrap();
    assert!((0..3).any(|i| best(i) != LABELS[i]));
    let taught: f64 = (0..3).map(|i| -row(&heads[1], i, 1.0)[best(i)]).sum::<f64>() / 3.0;
    check(loss(&hard, &params, None, KEY), 0.5 * labels(&heads[0]) + 0.5 * taught);
    let soft = classifier("deit_micro_distilled", &settings()).taught_by(teacher(Some(2.0))).unwrap();
    let divergence = |i: usize| -> f64 { row(&u, i, 2.0).iter().zip(row(&heads[1], i, 2.0)).map(|(t, s)| t.exp() * (t - s)).sum() };
    check(loss(&soft, &params, None, KEY), 0.5 * labels(&heads[0]) + 0.5 * 4.0 * (0..3).map(divergence).sum::<f64>() / 3.0);

    // A teacher that is used to other pixels gets them: what the student sees as x, it sees as (x std + mean − mean′) / std′.
    let student = settings().normalization;
    let other = Normalization { mean: [0.4, 0.5, 0.1], std: [0.2, 0.3, 0.9] };
    let plane = SIZE * SIZE;
    let seen = |i: usize| images(3).data()[i] * student.std[0] + student.mean[0];
    let pixels = Tensor::from_fn([3, 3, SIZE, SIZE], |i| (seen(i) - other.mean[i / plane % 3]) / other.std[i / plane % 3]);
    let u = own.logits(&own_params, &pixels).unwrap();
    let built = lessons.model("vit_micro", SIZE).unwrap().build().unwrap();
    let picky = Teacher::new(built, own_params, Some(2.0), other, student);
    let soft = classifier("deit_micro_distilled", &settings()).taught_by(picky).unwrap();
    let divergence = |i: usize| -> f64 { row(&u, i, 2.0).iter().zip(row(&heads[1], i, 2.0)).map(|(t, s)| t.exp() * (t - s)).sum() };
    check(loss(&soft, &params, None, KEY), 0.5 * labels(&heads[0]) + 0.5 * 4.0 * (0..3).map(divergence).sum::<f64>() / 3.0);

    let error = classifier("vit_micro", &settings()).taught_by(teacher(None)).err().unwrap().to_string();
    assert!(error.contains("two heads"), "{error}");
    let few = FineTune { class_names: vec!["a".into(), "b".into()], ..settings() };
    let error = classifier("deit_micro_distilled", &few).taught_by(teacher(None)).err().unwrap().to_string();
    assert!(error.contains("2 classes, found 10"), "{error}");
}

/// The published rule on a ViT of 6 blocks: 0.5⁷ for the embedding, 0.5^(6 − i) for block i, 1 for norm and head.
#[test]
fn layer_decay_of_vit_micro() {
    let finetune = FineTune { network: Config::default(), layer_decay: 0.5, ..settings() };
    let objective = classifier("vit_micro", &finetune);
    let rates = layer_rates(objective.layout(), 0.5);
    for entry in objective.layout().params() {
        let layer = match entry.name.split('.').collect::<Vec<_>>()[..] {
            ["blocks", i, ..] => i.parse::<i32>().unwrap() + 1,
            ["norm" | "head", ..] => 7,
            _ => 0,
        };
        assert_eq!(objective.rate(entry), 0.5f64.powi(7 - layer), "{}", entry.name);
        assert_eq!(rates[&entry.name], objective.rate(entry));
    }
    assert!(objective.layout().params().len() > 70);
}

#[test]
fn learns() {
    let folder = tempfile::tempdir().unwrap();
    let finetune = FineTune { limit: 320, ema: 0.9, ..settings() };
    let config =
        TrainConfig { length: Length::Epochs(12), batch: 16, lr: 5e-3, crop: 0.8, save_every: 0, finetune: Some(finetune), ..config() };
    train(folder.path(), &config, false, None).unwrap();
    let accuracies = read_accuracies(&folder.path().join(METRICS)).unwrap();
    assert!(accuracies.iter().map(|a| a.0).eq((1..=12).map(|epoch| 20 * epoch)));
    let (_, [top1, top5]) = accuracies[11];
    assert!(top1 > 0.4 && top5 > 0.8, "of ten classes: {accuracies:?}");
    let best = Checkpoint::open(folder.path().join(BEST)).unwrap();
    let most = accuracies.iter().map(|a| a.1[0]).fold(0.0, f64::max);
    assert_eq!(best.need_meta("top1").unwrap().parse::<f64>().unwrap(), most);
}

/// MAE's encoder arrives in the classifier of its fine-tuning, plain or made hierarchical as HPViT does it, tensor by tensor; head and
/// `fc_norm` stay new.
#[test]
fn pretrained_encoders() {
    let folder = tempfile::tempdir().unwrap();
    let mae = methods::build("mae", "vit_micro", 8, None).unwrap();
    let data = Dataset::builtin(Split::Test).unwrap();
    let config = TrainConfig { method: "mae".into(), model: "vit_micro".into(), image_size: 8, seed: 5, ..TrainConfig::default() };
    Trainer::new(&*mae, &data, config).unwrap().save(folder.path()).unwrap();
    let file = Checkpoint::open(folder.path().join(CHECKPOINT)).unwrap();
    let finetune = FineTune { network: finetuning_network("mae", "vit_micro").1, ..settings() };
    let load = |name, finetune: &FineTune, size| {
        let model = finetune.model(name, size).unwrap();
        let mut params = Params::init(&model.build().unwrap().layout, 9);
        transfer(&file, &model, &mut params).map(|loaded| (params, loaded))
    };
    for (name, size, resized) in [("vit_micro", 8, &[][..]), ("vit_micro", 16, &["pos_embed"]), ("hpvit_micro", 32, &["pos_embed"])] {
        let (params, loaded) = load(name, &finetune, size).unwrap();
        assert_eq!(loaded.fresh, ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"], "{name}");
        assert_eq!(loaded.resized, resized, "{name}");
        assert!(loaded.dropped.contains(&"decoder_pred.weight".into()) && loaded.dropped.contains(&"mask_token".into()));
        for entry in params.layout().params().iter().filter(|e| !loaded.fresh.contains(&e.name) && !resized.contains(&&*e.name)) {
            assert!(params.get(entry.param) == file.tensor(&entry.name).unwrap().data(), "{name}: {}", entry.name);
        }
    }
    let error = load("vit_micro", &settings(), 8).err().unwrap().to_string();
    assert!(error.contains("no pre-trained encoder of `vit_micro`") && error.contains("wrong shape"), "{error}");
}

/// Every method's small network arrives whole in the classifier of the zoo: what stays new are head and norms, and what arrives is what
/// was pre-trained.
#[test]
fn every_method_has_a_classifier() {
    // The zoo has no classifier with a Twins encoder.
    for (method, network) in METHODS.iter().flat_map(|m| m.networks.iter().map(move |n| (m, n))) {
        if !network.name.ends_with("_micro") || network.name == "green_twins_micro" {
            continue;
        }
        let (method, name) = (method.name, network.name);
        let trained = methods::build(method, name, network.size, None).unwrap();
        let params: Params<f32> = Params::init(trained.layout(), 5);
        let tensor = |x: &[f32], e: &Entry| (e.name.clone(), Tensor::new(e.param.shape(), x).unwrap());
        let mut tensors: Vec<_> = trained.layout().params().iter().map(|e| tensor(params.get(e.param), e)).collect();
        tensors.extend(trained.layout().buffers().iter().map(|e| tensor(params.buffer(e.param), e)));
        let folder = tempfile::tempdir().unwrap();
        write_tensors(folder.path().join(CHECKPOINT), &tensors, &[]).unwrap();
        let file = Checkpoint::open(folder.path().join(CHECKPOINT)).unwrap();

        let (classifier, config) = finetuning_network(method, name);
        let model = FineTune { network: config, ..FineTune { class_names: vec!["a".into(), "b".into()], ..FineTune::default() } };
        let model = model.model(&classifier, network.size).unwrap();
        let mut params = Params::init(&model.build().unwrap().layout, 9);
        let loaded = transfer(&file, &model, &mut params).unwrap_or_else(|e| panic!("{method}: {e}"));
        let new = |name: &str| ["head.", "fc.", "norm.", "fc_norm."].iter().any(|start| name.starts_with(start));
        assert!(loaded.fresh.iter().all(|name| new(name)), "{method} {name}: {:?}", loaded.fresh);
        assert!(loaded.resized.is_empty(), "{method} {name}: {:?}", loaded.resized);
        for entry in params.layout().params().iter().filter(|e| !loaded.fresh.contains(&e.name)) {
            assert!(tensors.iter().any(|(_, x)| x.data() == params.get(entry.param)), "{method} {name}: {}", entry.name);
        }
        // Blocks whose table was shared are told apart by nothing else than where the shared one went.
        let tables = params.layout().params().iter().filter(|e| e.name.ends_with(".attn.relative_position_bias_table")).count();
        assert!(!classifier.starts_with("beit") || tables == 6, "{classifier}: {tables} tables");
    }
}

#[test]
fn configurations() {
    let mut whole = config();
    whole.finetune.as_mut().unwrap().teacher =
        Some(karat::train::TeacherConfig { model: "vit_micro".into(), weights: "a b".into(), tau: Some(0.1 + 0.2) });
    let whole = whole.checked().unwrap();
    assert_eq!(TrainConfig::from_json(&whole.to_json().to_string()).unwrap(), whole);
    let bad = |change: fn(&mut FineTune)| {
        let mut config = config();
        change(config.finetune.as_mut().unwrap());
        config.checked().unwrap_err().to_string()
    };
    for (key, message) in [
        ("`mixup`", bad(|f| f.mixup = -1.0)),
        ("`smoothing`", bad(|f| f.smoothing = 1.0)),
        ("`randaug`", bad(|f| f.randaug = Some((2, 11.0)))),
        ("`layer_decay`", bad(|f| f.layer_decay = 0.0)),
        ("`ema`", bad(|f| f.ema = f64::NAN)),
        ("`erasing`", bad(|f| f.erasing = 2.0)),
    ] {
        assert!(message.contains(key), "{message}");
    }
    let mut json = config().to_json();
    json["mixdown"] = 1.into();
    assert!(TrainConfig::from_json(&json.to_string()).unwrap_err().to_string().contains("`mixdown`"));
    let error = classifier("vit_micro", &settings()).targets(&[10], 1.0).unwrap_err().to_string();
    assert!(error.contains("less than 10"), "{error}");
}

#[cfg(feature = "cli")]
mod program {
    use super::*;
    use std::process::Command;

    /// The outputs of `karat` with these arguments, which must end with `code`.
    fn karat(code: i32, folder: &Path, args: &str) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_karat")).current_dir(folder).args(args.split_whitespace()).output().unwrap();
        let (out, error) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert_eq!(output.status.code(), Some(code), "{args}: {out}{error}");
        if code == 0 { out } else { error }
    }

    fn bad(folder: &Path, args: &str, says: &str) {
        let error = karat(2, folder, args);
        assert!(error.lines().count() == 1 && error.contains(says), "{args}: {error}");
    }

    /// Folders of pictures, two in each class, to train and to test on.
    fn pictures(folder: &Path, picture: &Path, classes: &[&str]) {
        for (class, split) in classes.iter().flat_map(|c| ["train", "test"].map(|s| (c, s))) {
            let folder = folder.join(split).join(class);
            fs::create_dir_all(&folder).unwrap();
            for i in 0..2 {
                fs::copy(picture, folder.join(format!("{i}.png"))).unwrap();
            }
        }
    }

    /// Pre-trained, fine-tuned, resumed, used as a teacher; and what can be wrong about it.
    #[test]
    fn runs_and_complains() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        karat(0, dir, "pretrain --method mae --model vit_micro --image-size 8 --steps 1 --batch 4 --out mae");
        pictures(&dir.join("pets"), &dir.join("mae/reconstruction.png"), &["cat", "dog", "fish"]);
        let pets = "--data pets --image-size 8 --steps 2 --batch 3";
        let said = karat(0, dir, &format!("finetune --from mae {pets} --limit 5 --ema 0.9 --layer-decay 0.75 --out a"));
        assert!(said.contains("freshly initialised: 4 tensors of fc_norm, head") && said.contains("left out:"), "{said}");
        for name in ["config.toml", "metrics.jsonl", "loss.svg", "accuracy.svg", CHECKPOINT, BEST, STATE] {
            assert!(fs::metadata(dir.join("a").join(name)).unwrap().len() > 0, "{name}");
        }
        let whole = fs::read(dir.join("a").join(STATE)).unwrap();
        let file = Checkpoint::open(dir.join("a").join(CHECKPOINT)).unwrap();
        let config: serde_json::Value = serde_json::from_str(file.need_meta("config").unwrap()).unwrap();
        assert_eq!((&config["model"], &config["image_size"], &config["class_names"][2]), (&"vit_micro".into(), &8.into(), &"fish".into()));
        karat(0, dir, "finetune --resume a");
        assert!(fs::read(dir.join("a").join(STATE)).unwrap() == whole);
        // The run's own configuration makes the same run.
        karat(0, dir, "finetune --from mae --config a/config.toml --out b");
        assert!(fs::read(dir.join("b").join(STATE)).unwrap() == whole);
        // A configuration may change the network, with nothing to start from as well.
        fs::write(dir.join("flat.toml"), "crop = 1.0\n[network]\ndepth = 1\n").unwrap();
        let said = karat(0, dir, &format!("finetune --model vit_micro --config flat.toml {pets} --crop 0.9 --out flat"));
        let blocks =
            Checkpoint::open(dir.join("flat").join(CHECKPOINT)).unwrap().names().iter().filter(|n| n.contains(".norm1.weight")).count();
        let file = fs::read_to_string(dir.join("flat/config.toml")).unwrap();
        assert!(blocks == 1 && file.contains("crop = 0.9"), "{said}{file}");
        let student = format!("finetune --model deit_micro_distilled --teacher vit_micro --teacher-weights a {pets}");
        karat(0, dir, &format!("{student} --out c"));
        karat(0, dir, "finetune --resume c");

        bad(dir, "finetune --model vit_mikro", "unknown model `vit_mikro`; known: vit_micro");
        bad(dir, "finetune --model vit_micro --data pets --image-size 9 --batch 2 --out x", "patch");
        let other = "finetune --from mae --model deit_tiny_patch16_224 --image-size 32 --out x";
        bad(dir, other, "no pre-trained encoder of `deit_tiny_patch16_224`");
        bad(dir, "finetune --from nowhere", "nowhere");
        bad(dir, "finetune --out a", "already holds a run");
        bad(dir, "finetune --new-head --out x", "--new-head needs");
        bad(dir, "finetune --randaug 2 --out x", "N,M");
        bad(dir, "finetune --limit 6001 --out x", "1 to 6000");
        bad(dir, &format!("finetune --model vit_micro --teacher vit_micro --teacher-weights a {pets} --out x"), "two heads");
        bad(dir, "finetune --resume mae", "karat pretrain --resume");
        fs::write(dir.join("bad.toml"), "mixup = 0.5\ncolour = 1\n").unwrap();
        bad(dir, "finetune --config bad.toml --out x", "bad.toml: configuration key `colour`");
        bad(dir, "finetune --config mae/config.toml --out x", "`method`: mae is for another command");

        // Images of other classes: a teacher that does not know them, and a head that has to go.
        pictures(&dir.join("more"), &dir.join("mae/reconstruction.png"), &["cat", "dog"]);
        bad(dir, &format!("{student} --out x").replace("pets", "more"), "the teacher has other classes: 3, the images have 2");
        let again = "finetune --from a --data more --batch 2 --steps 1";
        bad(dir, &format!("{again} --out x"), "--new-head to leave it out");
        karat(0, dir, &format!("{again} --new-head --out d"));

        let mut damaged = whole;
        *damaged.last_mut().unwrap() ^= 1;
        fs::write(dir.join("a").join(STATE), damaged).unwrap();
        bad(dir, "finetune --resume a", "is damaged");
        assert!(!dir.join("x").exists(), "nothing is written before everything is known to fit");
    }
}
