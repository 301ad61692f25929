"""An independent judge of images: a classifier that never saw a model of this project."""

from __future__ import annotations

import numpy as np

from cm3leon.data.augment import AugmentConfig, varied


class Judge:
    """Support vector classifier (RBF kernel, scikit-learn) of images in 8x8 grey.

    That is the resolution at which the handwritten digits were scanned. It learns from the given
    images and from slightly moved versions of them.

    Args:
        images_BHWC: uint8 images, whose sides are multiples of 8, of the classes `labels_B`.
    """

    side = 8
    versions = 8

    def __init__(self, images_BHWC: np.ndarray, labels_B: np.ndarray) -> None:
        from sklearn.svm import SVC

        keys = [str(index) for index in range(len(images_BHWC))]
        moved = varied(images_BHWC, keys, AugmentConfig(versions=self.versions), seed=0)
        features_BF = self._features(np.concatenate([images_BHWC, *moved]))
        gamma = 2 / (features_BF.shape[1] * features_BF.var())  # twice scikit-learn's "scale"
        self._classifier = SVC(C=10, gamma=gamma).fit(
            features_BF, np.tile(labels_B, 1 + self.versions)
        )

    def read(self, images_BHWC: np.ndarray) -> np.ndarray:
        """The class (B,) that each image shows."""
        return self._classifier.predict(self._features(images_BHWC))

    def _features(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Mean grey of each of the 8x8 cells of an image, (B, 64), in [0, 1]."""
        B, H, W, C = images_BHWC.shape
        if H % self.side or W % self.side:
            raise ValueError(
                f"the judge needs sides that are multiples of {self.side}, got {H}x{W}"
            )
        cells = images_BHWC.reshape(B, self.side, H // self.side, self.side, W // self.side, C)
        return cells.mean(axis=(2, 4, 5)).reshape(B, -1) / 255
