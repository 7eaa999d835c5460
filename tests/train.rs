//! The promises of training: the same bits after kill and resume and for any number of threads; damaged files are noticed.

mod tiny;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use karat::data::{Dataset, Split};
use karat::nn::{Batch, Init, Layout, Loss, Objective, Params, StepKey, View};
use karat::tensor::Tensor;
use karat::train::{CHECKPOINT, Checkpoint, Length, METRICS, STATE, Schedule, TrainConfig, Trainer, decay_runs, decays, read_metrics};
use tiny::Tiny;

/// 31 steps of 15 an epoch; saves within epochs.
fn config() -> TrainConfig {
    TrainConfig {
        image_size: 8,
        length: Length::Steps(31),
        save_every: 7,
        seed: 5,
        lr: 3e-3 / 0.7,
        jitter: 0.2,
        milestones: vec![0.7, 0.9],
        ..TrainConfig::default()
    }
}

fn tiny() -> Tiny {
    Tiny::new(8, 1, 12).unwrap()
}

fn data() -> Dataset {
    Dataset::builtin(Split::Test).unwrap()
}

/// Trains in `folder` from the beginning, for at most `steps` steps as if killed then.
fn train(folder: &Path, kill_after: Option<u64>) {
    let (objective, data) = (tiny(), data());
    let mut trainer = Trainer::new(&objective, &data, config()).unwrap();
    run_until(&mut trainer, folder, kill_after);
}

fn resume(folder: &Path, kill_after: Option<u64>) -> karat::Result<()> {
    let (objective, data) = (tiny(), data());
    let state = Checkpoint::open(folder.join(STATE))?;
    let mut trainer = Trainer::resume(&objective, &data, &state)?;
    run_until(&mut trainer, folder, kill_after);
    Ok(())
}

/// A panic in the progress callback stands for the kill: nothing after it runs, files stay as they are.
fn run_until(trainer: &mut Trainer, folder: &Path, kill_after: Option<u64>) {
    let run = std::panic::AssertUnwindSafe(|| {
        trainer.run(folder, &mut |r| {
            if Some(r.step) == kill_after {
                std::panic::resume_unwind(Box::new(()))
            }
        })
    });
    match std::panic::catch_unwind(run) {
        Ok(result) => result.unwrap(),
        Err(_) => assert!(kill_after.is_some()),
    }
}

fn bytes(folder: &Path) -> [Vec<u8>; 2] {
    [CHECKPOINT, STATE].map(|name| fs::read(folder.join(name)).unwrap())
}

/// Step, epoch, loss, rate and norm of each line: all but the speed.
fn metrics(folder: &Path) -> Vec<String> {
    let text = fs::read_to_string(folder.join(METRICS)).unwrap();
    text.lines().map(|line| line.split(",\"images_per_second\"").next().unwrap().to_string()).collect()
}

#[test]
fn resumed_runs_end_in_the_same_bits() {
    let straight = tempfile::tempdir().unwrap();
    train(straight.path(), None);
    assert_eq!(metrics(straight.path()).len(), 31);
    // Before the first save but the initial one; within an epoch between saves; right after a save; in the last step.
    for kill in [1, 10, 15, 31] {
        let folder = tempfile::tempdir().unwrap();
        train(folder.path(), Some(kill));
        // What a kill in the middle of writing leaves: torn temporary files and a torn line.
        let torn = folder.path().join(format!(".{STATE}.{}.0.tmp", std::process::id()));
        fs::write(&torn, b"half").unwrap();
        let mut lines = fs::read(folder.path().join(METRICS)).unwrap();
        lines.extend_from_slice(b"{\"step\":3");
        fs::write(folder.path().join(METRICS), lines).unwrap();
        resume(folder.path(), Some(20.max(kill))).unwrap();
        resume(folder.path(), None).unwrap();
        assert!(bytes(folder.path()) == bytes(straight.path()), "killed after step {kill}");
        assert_eq!(metrics(folder.path()), metrics(straight.path()));
        assert!(!torn.exists());
    }
}

#[test]
fn a_kill_between_state_and_checkpoint_is_mended() {
    let folder = tempfile::tempdir().unwrap();
    train(folder.path(), None);
    let whole = bytes(folder.path());
    fs::remove_file(folder.path().join(CHECKPOINT)).unwrap();
    resume(folder.path(), None).unwrap();
    assert!(bytes(folder.path()) == whole);
}

#[test]
fn threads_do_not_matter() {
    let run = |threads| {
        let folder = tempfile::tempdir().unwrap();
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| train(folder.path(), None));
        (bytes(folder.path()), metrics(folder.path()))
    };
    let one = run(1);
    assert!(one == run(2) && one == run(3));
    let losses: Vec<f64> = {
        let folder = tempfile::tempdir().unwrap();
        train(folder.path(), None);
        read_metrics(&folder.path().join(METRICS)).unwrap().into_iter().map(|(_, loss)| loss).collect()
    };
    assert!(losses[30] < 0.7 * losses[0], "training learns: {losses:?}");
}

/// An objective that wants a second view of its images, prepared in the same way.
struct Twice(Tiny, View);

impl Objective for Twice {
    fn layout(&self) -> &Arc<Layout> {
        self.0.layout()
    }

    fn image_shape(&self) -> (usize, usize) {
        self.0.image_shape()
    }

    fn second_view(&self) -> Option<View> {
        Some(self.1)
    }

    fn loss(&self, params: &Params<f32>, grads: Option<&mut Params<f32>>, batch: Batch) -> karat::Result<Loss> {
        let (second, size) = (batch.second.unwrap(), self.1.size);
        assert_eq!(*second.shape(), [batch.images.shape()[0], 1, size, size]);
        if size == batch.images.shape()[2] {
            assert_eq!(second.data(), batch.images.data());
        }
        self.0.loss(params, grads, batch)
    }
}

/// Both views show the same crop, whatever the size of the second.
#[test]
fn the_second_view_shows_the_same_crop() {
    let (data, config) = (data(), config());
    for size in [8, 12] {
        let twice = Twice(tiny(), View { size, normalization: config.normalization() });
        let mut trainer = Trainer::new(&twice, &data, config.clone()).unwrap();
        for _ in 0..2 {
            trainer.step().unwrap();
        }
    }
}

/// The test objective's gradient is the derivative of its loss; so the tests above train on a true gradient.
#[test]
fn tiny_gradient() {
    let objective = tiny();
    let mut params = Params::<f32>::init(objective.layout(), 3);
    let images = Tensor::from_fn([3, 1, 8, 8], |i| ((i * 37 % 101) as f32 / 50.0) - 1.0);
    let batch = Batch { images: &images, labels: &[], second: None, key: StepKey { seed: 1, step: 2 } };
    let mut grads = Params::zeros(objective.layout());
    objective.loss(&params, Some(&mut grads), batch).unwrap();
    for at in (0..params.flat().len()).step_by(17) {
        let (old, h) = (params.flat()[at], 0.25);
        let mut at_offset = |d: f32| {
            params.flat_mut()[at] = old + d;
            objective.loss(&params, None, batch).unwrap().value
        };
        let numeric = (at_offset(h) - at_offset(-h)) / (2.0 * h);
        at_offset(0.0);
        assert!((numeric - grads.flat()[at]).abs() < 2e-5, "{at}: {numeric} {}", grads.flat()[at]);
    }
}

fn complaint(folder: &Path) -> String {
    let before: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    let error = resume(folder, None).unwrap_err().to_string();
    assert_eq!(fs::read_dir(folder).unwrap().count(), before.len(), "nothing written");
    assert!(error.contains(STATE) && !error.contains('\n'), "{error}");
    error
}

#[test]
fn damaged_states_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    train(folder.path(), Some(8));
    let path = folder.path().join(STATE);
    let good = fs::read(&path).unwrap();
    // One flipped bit anywhere: all of the header, some of the data.
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    for at in (0..header).chain((header..good.len()).step_by(997)) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, &bad).unwrap();
        assert!(Checkpoint::open(&path).is_err(), "flipped bit in byte {at} of {}", good.len());
    }
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 64;
    fs::write(&path, &bad).unwrap();
    assert!(complaint(folder.path()).contains("tensor `v.decoder.bias` is damaged"));
    for len in [0, 7, 100, header, good.len() - 1] {
        fs::write(&path, &good[..len]).unwrap();
        complaint(folder.path());
    }
    fs::remove_file(&path).unwrap();
    complaint(folder.path());
}

#[test]
fn strange_tensors_are_named() {
    let folder = tempfile::tempdir().unwrap();
    train(folder.path(), Some(8));
    let open = |name: &str| Checkpoint::open(folder.path().join(name)).unwrap();
    let load = |objective: &Tiny| open(CHECKPOINT).load(&mut Params::init(objective.layout(), 0));
    load(&tiny()).unwrap();
    let wrong = load(&Tiny::new(8, 1, 13).unwrap()).unwrap_err().to_string();
    assert!(wrong.contains("`encoder.weight`: expected F32 [13, 64], found F32 [12, 64]"), "{wrong}");
    // A state is no checkpoint, and the other way round.
    let missing = open(STATE).load(&mut Params::init(tiny().layout(), 0)).unwrap_err().to_string();
    assert!(missing.contains(STATE) && missing.contains("`encoder.weight` is missing"), "{missing}");
    let data = data();
    let error = Trainer::resume(&tiny(), &data, &open(CHECKPOINT)).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains(CHECKPOINT) && error.contains("`images`"), "{error}");
    let ((), fewer) = Layout::build(|names| {
        names.at("encoder").param("weight", [12, 64], Init::ZEROS);
        Ok(())
    })
    .unwrap();
    let unexpected = open(CHECKPOINT).load(&mut Params::zeros(&fewer)).unwrap_err().to_string();
    assert!(unexpected.contains("unexpected tensor `mask_token`"), "{unexpected}");
    let other = Dataset::builtin(Split::Train).unwrap();
    let error = Trainer::resume(&tiny(), &other, &open(STATE)).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("1000 images"), "{error}");
}

/// Reads by the independent safetensors crate: published names, shapes and values.
#[test]
fn checkpoints_are_plain_safetensors() {
    let folder = tempfile::tempdir().unwrap();
    let (objective, data) = (tiny(), data());
    let trainer = Trainer::new(&objective, &data, config()).unwrap();
    trainer.save(folder.path()).unwrap();
    let bytes = fs::read(folder.path().join(CHECKPOINT)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let entry = &objective.layout().params()[2];
    let tensor = file.tensor("decoder.weight").unwrap();
    assert_eq!((entry.name.as_str(), tensor.shape()), ("decoder.weight", &[64, 12][..]));
    let values: Vec<u8> = trainer.params().get(entry.param).iter().flat_map(|x| x.to_le_bytes()).collect();
    assert_eq!(tensor.data(), values);
}

#[test]
fn schedule() {
    let s = Schedule { peak: 2.0, floor: 0.5, warmup: 4, steps: 12, milestones: Vec::new() };
    assert_eq!([0, 1, 2, 3, 4].map(|i| s.rate(i)), [0.5, 1.0, 1.5, 2.0, 2.0]);
    assert!((s.rate(8) - 1.25).abs() < 1e-12, "half way down");
    assert!((s.rate(6) - (0.5 + 0.75 * (1.0 + 0.5f64.sqrt()))).abs() < 1e-12);
    assert_eq!([12, 100].map(|i| s.rate(i)), [0.5, 0.5]);
    let stepped = Schedule { floor: 0.01, milestones: vec![6, 9, 10], ..s.clone() };
    for (step, rate) in [(0, 0.5), (3, 2.0), (5, 2.0), (6, 0.2), (8, 0.2), (9, 0.02), (10, 0.01), (11, 0.01), (12, 0.01)] {
        assert!((stepped.rate(step) - rate).abs() < 1e-12, "step {step}");
    }
    let none = Schedule { warmup: 0, ..s };
    assert_eq!(none.rate(0), 2.0);
}

#[test]
fn decay_groups() {
    let ((), layout) = Layout::build(|names| {
        for (name, shape) in [("patch_embed.proj.weight", vec![16, 3]), ("patch_embed.proj.bias", vec![16])] {
            names.param(name, karat::tensor::Shape::try_new(&shape)?, Init::ZEROS);
        }
        for name in ["absolute_pos_embed", "pos_embed", "mask_token", "cls_token", "attn.relative_position_bias_table"] {
            names.param(name, [1, 3, 5], Init::ZEROS);
        }
        names.param("attn.qkv.weight", [7, 9], Init::ZEROS);
        names.param("mlp.fc1.weight", [9, 7], Init::ZEROS);
        names.param("norm.weight", [9], Init::ZEROS);
        Ok(())
    })
    .unwrap();
    let decaying: Vec<&str> = layout.params().iter().filter(|e| decays(e)).map(|e| e.name.as_str()).collect();
    assert_eq!(decaying, ["patch_embed.proj.weight", "attn.qkv.weight", "mlp.fc1.weight"]);
    let runs = decay_runs(&layout);
    assert_eq!(runs.iter().map(|(_, decay)| *decay).collect::<Vec<_>>(), [true, false, true, false]);
    for entry in layout.params() {
        let (start, end) = (entry.param.offset(), entry.param.offset() + entry.param.numel());
        assert!(runs.iter().any(|(r, decay)| *decay == decays(entry) && r.start <= start && end <= r.end), "{}", entry.name);
    }
}

#[test]
fn divergence_is_an_error() {
    let (objective, data) = (tiny(), data());
    let config = TrainConfig { lr: 1e30, warmup: 0.0, ..config() };
    let mut trainer = Trainer::new(&objective, &data, config).unwrap();
    let error = (0..10).find_map(|_| trainer.step().err()).unwrap().to_string();
    assert!(error.starts_with("loss: ") && error.contains("learning rate"), "{error}");
}

#[test]
fn configurations_survive_json_and_bad_ones_are_named() {
    let whole = TrainConfig { mask_ratio: Some(0.1 + 0.2), length: Length::Epochs(3), data: "a \"b\"".into(), drop_path: 0.1, ..config() }
        .checked()
        .unwrap();
    assert_eq!(TrainConfig::from_json(&whole.to_json().to_string()).unwrap(), whole);
    let bad = |change: fn(&mut TrainConfig)| {
        let mut config = config();
        change(&mut config);
        config.checked().unwrap_err().to_string()
    };
    for (key, message) in [
        ("`lr`", bad(|c| c.lr = f64::NAN)),
        ("`lr`", bad(|c| c.lr = -1.0)),
        ("`betas`", bad(|c| c.betas.1 = 1.0)),
        ("`warmup`", bad(|c| c.warmup = 1.0)),
        ("`mask_ratio`", bad(|c| c.mask_ratio = Some(1.5))),
        ("`jitter`", bad(|c| c.jitter = 1.5)),
        ("`drop_path`", bad(|c| c.drop_path = 1.0)),
        ("`milestones`", bad(|c| c.milestones = vec![0.5, 0.5])),
        ("`milestones`", bad(|c| c.milestones = vec![1.0])),
        ("`steps`", bad(|c| c.length = Length::Steps(0))),
        ("`epochs`", bad(|c| c.length = Length::Epochs(0))),
        ("`seed`", bad(|c| c.seed = u64::MAX)),
    ] {
        assert!(message.contains(key), "{message}");
    }
    let mut json = config().to_json();
    let older = json.as_object_mut().unwrap();
    ["jitter", "milestones", "drop_path"].iter().for_each(|key| assert!(older.remove(*key).is_some(), "{key}"));
    let older = TrainConfig::from_json(&json.to_string()).unwrap();
    assert_eq!((older.jitter, older.drop_path, older.milestones.len()), (0.0, 0.0, 0));
    json["colour"] = 1.into();
    assert!(TrainConfig::from_json(&json.to_string()).unwrap_err().to_string().contains("`colour`"));
}

/// On blobs that a line separates the probe is perfect; on labels that say nothing it is at chance.
#[test]
fn probes() {
    use karat::tensor::random::{Purpose, Rng};
    use karat::train::{Features, probe};
    let blobs = |n: usize, seed, informative: bool| {
        let mut rng = Rng::new(seed, Purpose::Probe, 0, 0);
        let labels: Vec<usize> = (0..n).map(|_| rng.below(4)).collect();
        let signal = if informative { 9.0 } else { 0.0 };
        let row = |rng: &mut Rng, label: usize| -> Vec<f32> {
            // A constant and a huge offset must not matter.
            (0..6).map(|j| if j == 5 { 7.0 } else { (1000.0 + if j == label { signal } else { 0.0 } + rng.normal()) as f32 }).collect()
        };
        let values = labels.iter().flat_map(|&l| row(&mut rng, l)).collect();
        Features { values, width: 6, labels }
    };
    let good = probe(&blobs(600, 1, true), &blobs(400, 2, true)).unwrap();
    assert!(good.accuracy > 0.99, "{good:?}");
    let chance = probe(&blobs(600, 3, false), &blobs(400, 4, false)).unwrap();
    assert!((0.15..0.35).contains(&chance.accuracy), "{chance:?}");
    let one = Features { values: vec![1.0; 12], width: 6, labels: vec![0; 2] };
    assert!(probe(&one, &one).unwrap_err().to_string().contains("two classes"));
}
