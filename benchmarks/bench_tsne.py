"""t-SNE maps by scikit-learn, which `features.tsne` uses, beside openTSNE: time and quality, interleaved in one run.

    pip install openTSNE  # not a dependency of the collection
    python benchmarks/bench_tsne.py [--points 500 2000] [--dimensions 256] [--rounds 5]

Both start from the same plane and make the same number of steps with the same perplexity, in one thread. The points
are those of twelve classes of falling size in a feature space. Quality by measures that belong to neither library: the
share of the 30 nearest neighbours that the map keeps, and scikit-learn's trustworthiness at 30 (1 is the best).
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from sklearn.manifold import trustworthiness
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from ltseg_core import features

STEPS, PERPLEXITY, NEIGHBOURS = 500, 30.0, 30


def pixels(points: int, dimensions: int) -> np.ndarray:
    """Twelve normal clouds, (N, D) float32."""
    rng = np.random.default_rng(0)
    label = rng.choice(12, points, p=(share := 0.7 ** np.arange(12)) / share.sum())
    return (rng.normal(size=(12, dimensions))[label] + rng.normal(size=(points, dimensions))).astype(np.float32)


def ours(x: np.ndarray) -> np.ndarray:
    return features.tsne({"": x}, perplexity=PERPLEXITY, steps=STEPS)[""]


def theirs(x: np.ndarray) -> np.ndarray:
    from openTSNE import TSNE
    from sklearn.decomposition import PCA

    plane = PCA(2, random_state=0).fit_transform(x)
    start = 1e-4 * plane / plane[:, 0].std()
    fit = TSNE(perplexity=PERPLEXITY, initialization=start, n_iter=STEPS - 250, n_jobs=1, random_state=0).fit
    return np.asarray(fit(x))  # 250 steps of early exaggeration, as in scikit-learn


def kept(x: np.ndarray, y: np.ndarray) -> float:
    """Share of the nearest neighbours in x that are so in y."""
    near = [NearestNeighbors(n_neighbors=NEIGHBOURS).fit(z).kneighbors(return_distance=False) for z in (x, y)]
    return float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(*near, strict=True)])) / NEIGHBOURS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(
        "| points | library | seconds | time, ours = 1 | neighbours kept | trustworthiness |\n|---|---|---|---|---|---|"
    )
    for points in args.points:
        x = pixels(points, args.dimensions)
        seconds: dict[str, list[float]] = {"scikit-learn": [], "openTSNE": []}
        maps = {}
        with threadpool_limits(1):
            for number in range(args.rounds + 1):
                for name, fit in (("scikit-learn", ours), ("openTSNE", theirs)):
                    start = time.perf_counter()
                    maps[name] = fit(x)
                    if number:  # the first round warms up
                        seconds[name].append(time.perf_counter() - start)
        ratio = np.median(np.array(seconds["openTSNE"]) / np.array(seconds["scikit-learn"]))
        for name, y in maps.items():
            print(
                f"| {points} | {name} | {np.median(seconds[name]):.2f} | {1 if name == 'scikit-learn' else ratio:.2f}"
                f" | {kept(x, y):.3f} | {trustworthiness(x, y, n_neighbors=NEIGHBOURS):.3f} |"
            )


if __name__ == "__main__":
    main()
