//! Window grouping: the golden cases, and properties against plain definitions.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use karat::grouping::{
    Budget, Grouping, MASKED, Mode, Plan, Rule, Windows, cost, group_windows, knapsack, optimal, plan, ragged_cost, sweep,
};
use proptest::collection::vec;
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

// ---- golden cases -------------------------------------------------------------------------------------------------------------

/// Shape and values; integers and masks are both exact in `f64`, and costs of the cases are far below 2^53.
type Answer = BTreeMap<String, (Dtype, Vec<usize>, Vec<f64>)>;

fn integers(shape: &[usize], values: impl IntoIterator<Item = usize>) -> (Dtype, Vec<usize>, Vec<f64>) {
    (Dtype::I64, shape.to_vec(), values.into_iter().map(|v| v as f64).collect())
}

fn list(values: impl IntoIterator<Item = usize>) -> (Dtype, Vec<usize>, Vec<f64>) {
    let values: Vec<usize> = values.into_iter().collect();
    integers(&[values.len()], values)
}

fn read(file: &SafeTensors, prefix: &str) -> Answer {
    let mut found = Answer::new();
    for (name, view) in file.tensors() {
        let Some(name) = name.strip_prefix(prefix) else { continue };
        let words = view.data().chunks_exact(8).map(|bytes| bytes.try_into().unwrap());
        let values = match view.dtype() {
            Dtype::I64 => words.map(|bytes| i64::from_le_bytes(bytes) as f64).collect(),
            Dtype::F64 => words.map(f64::from_le_bytes).collect(),
            other => panic!("{name}: {other:?}"),
        };
        found.insert(name.to_string(), (view.dtype(), view.shape().to_vec(), values));
    }
    found
}

fn compute(op: &str, config: &Value, inputs: &Answer) -> Answer {
    let key = |name: &str| config[name].as_u64().unwrap_or_else(|| panic!("{name} is a number")) as usize;
    let text = |name: &str| config[name].as_str().unwrap_or_else(|| panic!("{name} is a name"));
    let input = |name: &str| inputs[name].2.iter().map(|&v| v as usize).collect::<Vec<_>>();
    let mut answer = Answer::new();
    let mut put = |name: &str, value| assert!(answer.insert(name.into(), value).is_none());
    match op {
        "group.knapsack" => {
            let found = knapsack(&input("weights"), key("capacity")).unwrap();
            put("best", list([found.best]));
            put("index", list(found.index));
        }
        "group.windows" => {
            let found = group_windows(&input("sizes"), key("group_size")).unwrap();
            put("num_groups", list([found.num_groups()]));
            put("group_len", list(found.groups.iter().map(Vec::len)));
            put("group_index", list(found.groups.concat()));
            put("num_ele_group", list(found.tokens));
        }
        "group.optimal" => {
            let found = optimal(&input("sizes"), key("group_size"), Budget::default()).unwrap();
            assert!(found.proved);
            put("num_groups", list([found.grouping.num_groups()]));
            put("greedy_num_groups", list([found.greedy_num_groups]));
            put("lower_bound_l1", list([found.l1]));
            put("lower_bound_l2", list([found.l2]));
        }
        "group.sweep" => {
            let found = sweep(&input("sizes"), key("channels"), Budget::default()).unwrap();
            assert!(found.proved);
            for (prefix, choice) in [("", &found.greedy), ("opt_", &found.optimal)] {
                put(&format!("{prefix}group_size"), list([choice.grouping.group_size]));
                put(&format!("{prefix}num_groups"), list([choice.grouping.num_groups()]));
                put(&format!("{prefix}cost"), list([choice.cost as usize]));
            }
            put("ragged_cost", list([found.ragged_cost as usize]));
            put("max_rule_cost", list([found.max_rule_cost as usize]));
        }
        "group.plan" => {
            let coords: Vec<[usize; 2]> = input("coords").chunks_exact(2).map(|yx| [yx[0], yx[1]]).collect();
            let (mode, rule) = (Mode::parse(text("mode")).unwrap(), Rule::parse(text("group_size")).unwrap());
            let found = plan(&coords, key("window_size"), key("shift_size"), mode, rule, key("channels")).unwrap();
            let (n, g) = (found.grouping.num_groups(), found.grouping.group_size);
            put("grouped", list([found.grouped.into()]));
            put("group_size", list([g]));
            put("num_groups", list([n]));
            put("window_yx", integers(&[coords.len(), 2], found.windows.yx.iter().flatten().map(|&v| v as usize)));
            put("idx_shuffle", list(found.idx_shuffle.iter().map(|&v| v as usize)));
            put("idx_unshuffle", list(found.idx_unshuffle.iter().map(|&v| v as usize)));
            put("attn_mask", (Dtype::F64, vec![n, g, g], found.attn_mask));
            put("rel_pos_idx", integers(&[n, g, g], found.rel_pos_idx.iter().map(|&v| v as usize)));
        }
        _ => panic!("no operation {op}"),
    }
    answer
}

fn check(path: &Path, op: &str) {
    let bytes = std::fs::read(path).unwrap();
    let metadata = SafeTensors::read_metadata(&bytes).unwrap().1.metadata().clone().unwrap();
    assert_eq!(metadata["op"], op, "{}", path.display());
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let config = serde_json::from_str(&metadata["config"]).unwrap();
    let (expected, found) = (read(&file, "output."), compute(op, &config, &read(&file, "input.")));
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>(), "{}", path.display());
    for (name, expected) in &expected {
        assert_eq!(expected, &found[name], "{}: {name}", path.display());
    }
}

#[test]
fn golden_cases() {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/cases");
    for op in ["group.knapsack", "group.windows", "group.optimal", "group.sweep", "group.plan"] {
        let mut files: Vec<PathBuf> = std::fs::read_dir(cases.join(op)).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
        assert!(!files.is_empty(), "{op} has no case");
        files.iter().for_each(|path| check(path, op));
    }
}

// ---- plain definitions --------------------------------------------------------------------------------------------------------

/// The table and its trace, row by row.
fn table_knapsack(weights: &[usize], capacity: usize) -> (usize, Vec<usize>) {
    let mut table = vec![vec![0; capacity + 1]];
    for (i, &w) in weights.iter().enumerate() {
        table.push((0..=capacity).map(|r| if w <= r { table[i][r].max(w + table[i][r - w]) } else { table[i][r] }).collect());
    }
    let (mut index, mut r, best) = (Vec::new(), capacity, table[weights.len()][capacity]);
    let mut value = best;
    for i in (0..weights.len()).rev() {
        if value == 0 {
            break;
        }
        if table[i][r] != value {
            index.insert(0, i);
            (r, value) = (r - weights[i], value - weights[i]);
        }
    }
    (best, index)
}

/// Greedy grouping with the table.
fn table_groups(sizes: &[usize], group_size: usize) -> Vec<Vec<usize>> {
    let (mut remaining, mut groups): (Vec<usize>, _) = ((0..sizes.len()).collect(), Vec::new());
    while !remaining.is_empty() {
        let weights: Vec<usize> = remaining.iter().map(|&i| sizes[i]).collect();
        let chosen = table_knapsack(&weights, group_size).1;
        groups.push(chosen.iter().map(|&k| remaining[k]).collect());
        remaining = remaining.iter().copied().enumerate().filter(|(k, _)| !chosen.contains(k)).map(|(_, i)| i).collect();
    }
    groups
}

/// Fewest groups by trying every set partition.
fn brute_force(sizes: &[usize], group_size: usize) -> usize {
    fn place(rest: &[usize], loads: &mut Vec<usize>, group_size: usize) -> usize {
        let Some((&size, rest)) = rest.split_first() else { return loads.len() };
        let mut best = usize::MAX;
        for k in 0..loads.len() {
            if loads[k] + size <= group_size {
                loads[k] += size;
                best = best.min(place(rest, loads, group_size));
                loads[k] -= size;
            }
        }
        loads.push(size);
        best = best.min(place(rest, loads, group_size));
        loads.pop();
        best
    }
    place(sizes, &mut Vec::new(), group_size)
}

/// Fewest groups by dynamic programming over subsets: for every subset the fewest groups and then the least loaded last one.
fn subset_optimum(sizes: &[usize], group_size: usize) -> usize {
    let mut best = vec![(usize::MAX, 0); 1 << sizes.len()];
    best[0] = (0, group_size);
    for subset in 1..best.len() {
        for (i, &size) in sizes.iter().enumerate().filter(|(i, _)| subset >> i & 1 == 1) {
            let (groups, load) = best[subset & !(1 << i)];
            let with = if load + size <= group_size { (groups, load + size) } else { (groups + 1, size) };
            best[subset] = best[subset].min(with);
        }
    }
    best[best.len() - 1].0
}

/// `L2` word for word from its definition.
fn plain_l2(sizes: &[usize], g: usize) -> usize {
    let l1 = sizes.iter().sum::<usize>().div_ceil(g);
    let alphas = sizes.iter().copied().filter(|w| 2 * w <= g).chain([0]);
    let bound = |alpha: usize| {
        let pick = |keep: &dyn Fn(usize) -> bool| sizes.iter().copied().filter(|&w| keep(w)).collect::<Vec<_>>();
        let (j1, j2) = (pick(&|w| w > g - alpha), pick(&|w| w <= g - alpha && 2 * w > g));
        let j3: usize = pick(&|w| 2 * w <= g && w >= alpha).iter().sum();
        let free = j2.len() * g - j2.iter().sum::<usize>();
        j1.len() + j2.len() + j3.saturating_sub(free).div_ceil(g)
    };
    alphas.map(bound).max().unwrap().max(l1)
}

fn assert_partition(found: &Grouping, sizes: &[usize]) {
    let mut members = found.groups.concat();
    members.sort_unstable();
    assert!(members.iter().copied().eq(0..sizes.len()), "{found:?}");
    for (group, &tokens) in found.groups.iter().zip(&found.tokens) {
        assert!(!group.is_empty() && group.is_sorted() && tokens <= found.group_size);
        assert_eq!(group.iter().map(|&i| sizes[i]).sum::<usize>(), tokens);
    }
    assert_eq!(found.groups.len(), found.tokens.len());
}

/// Windows with a group size that holds each.
fn instance(windows: usize, largest: usize) -> impl Strategy<Value = (Vec<usize>, usize)> {
    (vec(1..=largest, 1..=windows), 0..=largest).prop_map(|(sizes, more)| {
        let group_size = sizes.iter().max().unwrap() + more;
        (sizes, group_size)
    })
}

// ---- properties ---------------------------------------------------------------------------------------------------------------

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn knapsack_is_the_table(weights in vec(0usize..90, 0..12), capacity in 0usize..300) {
        let found = knapsack(&weights, capacity).unwrap();
        prop_assert_eq!((found.best, found.index), table_knapsack(&weights, capacity));
    }

    #[test]
    fn greedy_is_the_table_greedy((sizes, group_size) in instance(30, 49)) {
        let found = group_windows(&sizes, group_size).unwrap();
        assert_partition(&found, &sizes);
        prop_assert_eq!(found.groups, table_groups(&sizes, group_size));
    }

    #[test]
    fn optimum_is_the_brute_force_one((sizes, group_size) in instance(8, 12)) {
        let found = optimal(&sizes, group_size, Budget::default()).unwrap();
        assert_partition(&found.grouping, &sizes);
        prop_assert!(found.proved);
        prop_assert_eq!(found.grouping.num_groups(), brute_force(&sizes, group_size));
    }

    /// Windows of a fifth to a half of a group are the hard ones: several fit, seldom exactly.
    #[test]
    fn optimum_is_the_subset_one(sizes in vec(20usize..50, 9..13), group_size in 60usize..140) {
        let found = optimal(&sizes, group_size, Budget::default()).unwrap();
        assert_partition(&found.grouping, &sizes);
        prop_assert!(found.proved && found.l1 <= found.l2 && found.l2 <= found.grouping.num_groups());
        prop_assert_eq!(found.grouping.num_groups(), subset_optimum(&sizes, group_size));
        prop_assert_eq!(found.l2, plain_l2(&sizes, group_size));
    }

    #[test]
    fn l2_is_its_definition((sizes, group_size) in instance(40, 49)) {
        let found = optimal(&sizes, group_size, Budget { nodes: 0 }).unwrap();
        prop_assert_eq!(found.l2, plain_l2(&sizes, group_size));
        prop_assert_eq!(found.l1, sizes.iter().sum::<usize>().div_ceil(group_size));
    }

    #[test]
    fn any_budget_gives_a_partition((sizes, group_size) in instance(40, 20), nodes in 0u64..200) {
        let (cut, full) = (optimal(&sizes, group_size, Budget { nodes }).unwrap(), optimal(&sizes, group_size, Budget::default()).unwrap());
        assert_partition(&cut.grouping, &sizes);
        prop_assert!(cut.nodes <= nodes && full.proved);
        prop_assert!(cut.grouping.num_groups() <= cut.greedy_num_groups);
        prop_assert!(cut.grouping.num_groups() >= full.grouping.num_groups());
        prop_assert!(!cut.proved || cut.grouping.num_groups() == full.grouping.num_groups());
    }

    #[test]
    fn sweep_is_the_unpruned_sweep(sizes in vec(1usize..=12, 1..=10), channels in 1usize..80) {
        let found = sweep(&sizes, channels, Budget::default()).unwrap();
        let (largest, total) = (*sizes.iter().max().unwrap(), sizes.iter().sum());
        let first_least = |groups: &dyn Fn(usize) -> usize| {
            (largest..=total).map(|g| (cost(groups(g), g, channels).unwrap(), g)).min().unwrap()
        };
        prop_assert_eq!((found.greedy.cost, found.greedy.grouping.group_size), first_least(&|g| table_groups(&sizes, g).len()));
        prop_assert_eq!((found.optimal.cost, found.optimal.grouping.group_size), first_least(&|g| subset_optimum(&sizes, g)));
        prop_assert_eq!(found.lower_bound, first_least(&|g| plain_l2(&sizes, g)).0);
        prop_assert_eq!(found.max_rule_cost, cost(table_groups(&sizes, largest).len(), largest, channels).unwrap());
        for choice in [&found.greedy, &found.optimal] {
            assert_partition(&choice.grouping, &sizes);
            prop_assert_eq!(choice.cost, choice.grouping.cost(channels).unwrap());
        }
    }

    #[test]
    fn costs_are_ordered(sizes in vec(1usize..=49, 1..40), channels in 1usize..600, nodes in 0u64..400) {
        let found = sweep(&sizes, channels, Budget { nodes }).unwrap();
        let chain = [found.ragged_cost, found.lower_bound, found.optimal.cost, found.greedy.cost, found.max_rule_cost];
        prop_assert!(chain.is_sorted(), "{:?}", chain);
        prop_assert_eq!(found.ragged_cost, ragged_cost(&sizes, channels).unwrap());
        let full = sweep(&sizes, channels, Budget::default()).unwrap();
        prop_assert!(full.proved && full.optimal.cost <= found.optimal.cost);
        prop_assert!(!found.proved || full.optimal.cost == found.optimal.cost);
    }

    #[test]
    fn plans_shuffle_and_mask(
        visible in vec(any::<bool>(), 100), side in 1usize..6, shift in 0usize..6, grouping: bool, paper: bool,
    ) {
        let coords: Vec<[usize; 2]> = (0..100).filter(|&i| visible[i]).map(|i| [i / 10, i % 10]).collect();
        let (mode, rule) = (if grouping { Mode::Grouping } else { Mode::Masking }, if paper { Rule::Paper } else { Rule::Max });
        let shift = shift % side;
        let found = plan(&coords, side, shift, mode, rule, 16).unwrap();
        assert_plan(&found, &coords, side, (side - shift) % side);
        prop_assert_eq!(found.grouped, grouping);
        if !grouping {
            prop_assert!(found.idx_shuffle.iter().enumerate().all(|(slot, &token)| slot == token as usize));
        }
        let auto = plan(&coords, side, shift, Mode::Auto, rule, 16).unwrap();
        prop_assert_eq!(auto.grouped, coords.len() > 2 * side * side);
    }

    /// Any order of tokens and rectangular windows.
    #[test]
    fn windows_are_their_definition(
        coords in vec([0usize..20, 0..20], 0..60), window in (1usize..6, 1usize..6), shift in (0usize..6, 0usize..6),
    ) {
        let shift = (shift.0 % window.0, shift.1 % window.1);
        let found = Windows::new(&coords, window, shift).unwrap();
        let at = |v: usize, side: usize, shift: usize| (v + (side - shift) % side).div_euclid(side);
        let mut expected: BTreeMap<[u32; 2], Vec<u32>> = BTreeMap::new();
        for (token, &[y, x]) in coords.iter().enumerate() {
            let yx = [at(y, window.0, shift.0) as u32, at(x, window.1, shift.1) as u32];
            prop_assert_eq!(found.yx[token], yx);
            expected.entry(yx).or_default().push(token as u32);
        }
        prop_assert_eq!(found.len(), expected.len());
        prop_assert_eq!(found.sizes(), expected.values().map(Vec::len).collect::<Vec<_>>());
        for (i, tokens) in expected.values().enumerate() {
            prop_assert_eq!(&found.tokens[found.range(i)], &tokens[..]);
        }
        for (&token, &position) in found.tokens.iter().zip(&found.positions) {
            let [y, x] = coords[token as usize];
            let local = |v: usize, side: usize, shift: usize| (v + side - shift) % side;
            prop_assert_eq!(position as usize, local(y, window.0, shift.0) * window.1 + local(x, window.1, shift.1));
        }
    }

    /// Swin rolls the map by the shift, cuts it, and masks pairs whose labels differ.
    #[test]
    fn dense_windows_are_swins(
        window in (1usize..6, 1usize..6), times in (1usize..4, 1usize..4), shift in (0usize..6, 0usize..6),
    ) {
        let shift = (shift.0 % window.0, shift.1 % window.1);
        let (height, width) = (window.0 * times.0, window.1 * times.1);
        let found = Windows::dense(height, width, window, shift).unwrap();
        let label = |r: usize, extent: usize, side: usize, shift: usize| match shift {
            0 => 0,
            _ if r < extent - side => 0,
            _ if r < extent - shift => 1,
            _ => 2,
        };
        // Window, label and local position of each token in the rolled map.
        let rolled: Vec<_> = (0..height * width).map(|token| {
            let r = (token / width + height - shift.0) % height;
            let c = (token % width + width - shift.1) % width;
            let labels = (label(r, height, window.0, shift.0), label(c, width, window.1, shift.1));
            ((r / window.0, c / window.1, labels), (r % window.0 * window.1 + c % window.1) as u32)
        }).collect();
        prop_assert_eq!(found.tokens.len(), rolled.len());
        for (&token, &position) in found.tokens.iter().zip(&found.positions) {
            prop_assert_eq!(position, rolled[token as usize].1);
        }
        for i in 0..rolled.len() {
            for j in 0..rolled.len() {
                prop_assert_eq!(found.yx[i] == found.yx[j], rolled[i].0 == rolled[j].0, "tokens {} and {}", i, j);
            }
        }
    }
}

/// Shuffling and unshuffling are inverse, and mask and relative positions are what the coordinates say.
fn assert_plan(found: &Plan, coords: &[[usize; 2]], side: usize, offset: usize) {
    let (g, groups) = (found.grouping.group_size, found.grouping.num_groups());
    assert_eq!((found.idx_shuffle.len(), found.idx_unshuffle.len()), (groups * g, coords.len()));
    let mut token_in = vec![None; groups * g];
    for (token, &slot) in found.idx_unshuffle.iter().enumerate() {
        assert_eq!(found.idx_shuffle[slot as usize] as usize, token);
        assert_eq!(token_in[slot as usize].replace(token), None);
    }
    for (slot, token) in token_in.iter().enumerate() {
        assert!(token.is_some() || found.idx_shuffle[slot] == 0);
    }
    let window = |token: usize| coords[token].map(|v| (v + offset) / side);
    assert_eq!(found.attn_mask.len(), groups * g * g);
    for query in 0..groups * g {
        for key in query / g * g..(query / g + 1) * g {
            let at = query * g + key % g;
            let expected = match (token_in[query], token_in[key]) {
                (Some(q), Some(k)) if window(q) == window(k) => {
                    let delta = |axis: usize| coords[q][axis] + side - 1 - coords[k][axis];
                    (0.0, delta(0) * (2 * side - 1) + delta(1))
                }
                _ => (MASKED, 0),
            };
            assert_eq!((found.attn_mask[at], found.rel_pos_idx[at] as usize), expected);
        }
    }
}

/// No order of at most five windows defeats the greedy: the smallest failing instance has six.
#[test]
fn greedy_is_optimal_up_to_five_windows() {
    for group_size in 1..=7usize {
        for code in 0..group_size.pow(5) {
            let sizes: Vec<usize> = (0..5).map(|k| code / group_size.pow(k) % group_size + 1).collect();
            for n in 1..=5 {
                let found = optimal(&sizes[..n], group_size, Budget::default()).unwrap();
                assert!(found.proved && found.grouping.num_groups() == found.greedy_num_groups, "{:?} in {group_size}", &sizes[..n]);
            }
        }
    }
}

/// Greedy failures of six windows: (group size, windows, greedy, optimum).
#[test]
fn greedy_fails_as_published() {
    for (group_size, sizes, greedy, best) in [
        (3, [1, 1, 1, 2, 2, 2], 4, 3),
        (4, [1, 1, 2, 2, 3, 3], 4, 3),
        (5, [1, 2, 2, 3, 3, 3], 4, 3),
        (6, [1, 2, 3, 3, 4, 4], 4, 3),
        (9, [3, 3, 3, 5, 5, 5], 4, 3),
        (10, [1, 2, 3, 7, 8, 8], 4, 3),
    ] {
        let found = optimal(&sizes, group_size, Budget::default()).unwrap();
        assert_eq!((found.greedy_num_groups, found.grouping.num_groups(), found.proved), (greedy, best, true), "{sizes:?}");
        assert_eq!(group_windows(&sizes, group_size).unwrap().num_groups(), greedy);
    }
    let reversed = [2, 2, 2, 1, 1, 1];
    assert_eq!(group_windows(&reversed, 3).unwrap().num_groups(), 3);
}
