"""Sheet `greenmim` §3: packing windows into equal groups. Integers only, plain Python."""


def knapsack(weights: list[int], capacity: int) -> tuple[int, list[int]]:
    """Largest subset sum within the capacity, and the chosen indices; among equal sums the lower ones win."""
    best = [[0] * (capacity + 1)]
    for w in weights:
        above = best[-1]
        best.append([max(v, w + above[r - w]) if w <= r else v for r, v in enumerate(above)])
    index, r = [], capacity
    for i in range(len(weights), 0, -1):
        if best[i][r] != best[i - 1][r]:
            index.append(i - 1)
            r -= weights[i - 1]
    return best[-1][capacity], index[::-1]


def greedy_groups(sizes: list[int], capacity: int) -> list[list[int]]:
    """The released algorithm: fill one group as full as possible, then the next."""
    if any(not 1 <= w <= capacity for w in sizes):
        raise ValueError(f"window sizes must be in 1..{capacity}")
    rest, groups = list(range(len(sizes))), []
    while rest:
        chosen = [rest[i] for i in knapsack([sizes[i] for i in rest], capacity)[1]]
        groups.append(chosen)
        rest = [i for i in rest if i not in set(chosen)]
    return groups


def lower_bounds(sizes: list[int], capacity: int) -> tuple[int, int]:
    """L1 (volume) and L2 (Martello-Toth) lower bounds on the number of groups."""
    l1 = l2 = -(-sum(sizes) // capacity)
    for a in {0} | {w for w in sizes if 2 * w <= capacity}:
        large = sum(w > capacity - a for w in sizes)
        medium = [w for w in sizes if capacity - a >= w and 2 * w > capacity]
        small = sum(w for w in sizes if 2 * w <= capacity and w >= a)
        overflow = small - (len(medium) * capacity - sum(medium))
        l2 = max(l2, large + len(medium) + max(0, -(-overflow // capacity)))
    return l1, l2


def optimal_count(sizes: list[int], capacity: int) -> int:
    """Fewest groups of this capacity: depth-first branch and bound from a best-fit-decreasing start."""
    items, floor = sorted(sizes, reverse=True), lower_bounds(sizes, capacity)[1]
    bins = []
    for w in items:
        fits = [i for i, load in enumerate(bins) if load + w <= capacity]
        if fits:
            bins[max(fits, key=bins.__getitem__)] += w
        else:
            bins.append(w)
    best, seen = len(bins), set()

    def place(i: int, loads: tuple[int, ...]):
        nonlocal best
        if i == len(items):
            best = min(best, len(loads))
            return
        free = len(loads) * capacity - sum(loads)
        if len(loads) + max(0, -(-(sum(items[i:]) - free) // capacity)) >= best or (i, loads) in seen:
            return
        seen.add((i, loads))
        for load in sorted({x for x in loads if x + items[i] <= capacity}, reverse=True) + [0]:
            kept = list(loads)
            if load:
                kept.remove(load)
            place(i + 1, tuple(sorted(kept + [load + items[i]])))
            if best == floor:
                return

    if best > floor:
        place(0, ())
    return best


def cost(count: int, size: int, channels: int) -> int:
    """Multiply-accumulates of attention over `count` groups of `size` tokens."""
    return count * (4 * size * channels**2 + 2 * size**2 * channels)


def sweep(sizes: list[int], channels: int, count=lambda sizes, g: len(greedy_groups(sizes, g))) -> tuple[int, int, int]:
    """Group size, number of groups and cost of the cheapest capacity (the first, if several are)."""
    total, best = sum(sizes), None
    for g in range(max(sizes), total + 1):
        if best and total * (4 * channels**2 + 2 * g * channels) >= best[2]:
            break
        n = count(sizes, g)
        if best is None or cost(n, g, channels) < best[2]:
            best = (g, n, cost(n, g, channels))
    return best


def window_lists(coords: list[tuple[int, int]], window: int, shift: int) -> dict[tuple[int, int], list[int]]:
    """Tokens of every non-empty window; windows in lexicographic order, tokens ascending."""
    offset, windows = (window - shift) % window, {}
    for i, (y, x) in enumerate(coords):
        windows.setdefault(((y + offset) // window, (x + offset) // window), []).append(i)
    return dict(sorted(windows.items()))
