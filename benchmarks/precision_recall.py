"""Precision and recall of features by matrix products, beside the definition by scipy's distances.

    OMP_NUM_THREADS=1 python benchmarks/precision_recall.py --images 3000

Both compute in one thread, and must give the same figures. A quarter of the made features equal
real ones, so that distances of 0 are among them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist

from cm3leon.evaluation.images import precision_recall


def one_by_one(real_MD: np.ndarray, made_ND: np.ndarray) -> tuple[float, float]:
    """Precision and recall by their definition, with every distance in float64."""

    def share_inside(points_ND: np.ndarray, of_MD: np.ndarray) -> float:
        # To the third nearest neighbour; a point is its own nearest one, in column 0.
        radius_M = np.sort(cdist(of_MD, of_MD), axis=1)[:, 3]
        return float((cdist(points_ND, of_MD) <= radius_M).any(axis=1).mean())

    return share_inside(made_ND, real_MD), share_inside(real_MD, made_ND)


def timed(work: Callable[..., Any], *given: np.ndarray) -> tuple[Any, float]:
    """A result, and the processor's seconds for it."""
    begun = time.process_time()
    return work(*given), time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=3000, help="real ones, and as many made ones")
    parser.add_argument("--features", type=int, default=2048)
    options = parser.parse_args()

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    shape = options.images, options.features
    real_MD = np.abs(rng.normal(size=shape)).astype(np.float32)
    made_ND = (np.abs(rng.normal(size=shape)) * 1.01).astype(np.float32)

    # What a model copied lies exactly on a real point, in both directions.
    made_ND[: options.images // 4] = real_MD[: options.images // 4]

    products, seconds = timed(precision_recall, real_MD, made_ND)
    distances, longer = timed(one_by_one, real_MD.astype(float), made_ND.astype(float))
    print(f"products:   {seconds:7.2f} s, {products}")
    print(f"one by one: {longer:7.2f} s, {distances}")
    print(f"{longer / seconds:.1f} times; equal: {products == distances}")


if __name__ == "__main__":
    main()
