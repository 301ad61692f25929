"""The stage that measures how well held-out images survive the image tokenizer, and its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cm3leon.evaluation.images import Inception
from cm3leon.evaluation.reconstruction import reconstruction_figures
from cm3leon.evaluation.report import (
    Fact,
    Picture,
    Report,
    Section,
    Strip,
    logged,
    numbers,
    write_report,
)
from cm3leon.io import write_json
from cm3leon.stages.attribution import attribution
from cm3leon.stages.inputs import depends_on, recorded
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.stage import Stage
from cm3leon.tokenizers.image.perceptual import Perceptual

FIGURES = "figures.json"
SHOWN = 12
"""Images on the page."""
HEIGHT = 192
"""Height of an image in CSS pixels."""
CURVES = {
    "psnr_db": "PSNR, dB",
    "perplexity_of_batch": "perplexity of the codes",
    "perceptual": "LPIPS",
    "discriminator_loss": "discriminator's loss",
}
"""Training records that are plotted, and the names of their axes."""


def make_reconstruction(run: RunFolder, folder: Path) -> None:
    """Measure the reconstructions of the held-out images, if there are any,
    and show some of them."""
    rows = run.corpus.rows("held_out")
    if not len(rows):
        write_json(folder / FIGURES, {})
        return

    # LPIPS and FID need published weights.
    config = run.experiment.reconstruction
    perceptual = extractor = None
    if config.perceptual_file:
        perceptual = Perceptual.load(config.perceptual_file).to(run.device)
    if config.inception_file:
        extractor = Inception.load(config.inception_file, run.device)

    codes_BN = run.codes_MN[rows]
    figures = reconstruction_figures(
        run.corpus.images_BHWC[rows],
        run.image_tokenizer.decode(codes_BN, title="decoding"),
        codes_BN,
        run.image_tokenizer.codebook_size,
        perceptual=perceptual,
        extractor=extractor,
    )
    write_json(folder / FIGURES, figures)
    write_report(folder / "report.html", _report(run, figures))


def _report(run: RunFolder, figures: dict[str, Any]) -> Report:
    rows = run.corpus.rows("held_out")[:SHOWN]
    rebuilt_BHWC = run.image_tokenizer.decode(run.codes_MN[rows])
    originals = [Picture(pixels, height=HEIGHT) for pixels in run.corpus.images_BHWC[rows]]
    rebuilt = [Picture(pixels, height=HEIGHT) for pixels in rebuilt_BHWC]
    tokenizer, log = run.image_tokenizer, run.log("image_tokenizer")

    # A tokenizer that was not trained here has no log, and some losses have no discriminator.
    drawn = []
    for name, label in CURVES.items():
        curve = logged(label, log, {"batch": name}, label, is_noisy=True)
        if curve.series:
            drawn.append(curve)
    return Report(
        title=f"Image tokenizer on {run.experiment.data.name}",
        subtitle=(
            f"{tokenizer.image_size}x{tokenizer.image_size} pixels to "
            f"{tokenizer.grid}x{tokenizer.grid} codes of {tokenizer.codebook_size}, judged on "
            f"{figures['images']:,} held-out images."
        ),
        facts=[
            _fact("PSNR", figures["psnr_db"], "{:.1f} dB"),
            _fact("SSIM", figures["ssim"], "{:.3f}"),
            _fact(
                "LPIPS", figures["lpips"], "{:.3f}", "no weights: reconstruction.perceptual_file"
            ),
            _fact("rFID", figures["rfid"], "{:.2f}", "no weights: reconstruction.inception_file"),
            Fact(
                "codes in use",
                f"{figures['codebook_use']:.0%}",
                f"perplexity {figures['codebook_perplexity']:.0f}",
            ),
        ],
        sections=[
            Section(
                "Reconstructions",
                "Held-out images, and what comes back from their codes: everything a model draws "
                "is bounded by this.",
                [Strip([("original", originals), ("from codes", rebuilt)])],
            ),
            *([Section("Training", "Figures of training batches.", drawn)] if drawn else []),
            Section("To make it again", "The settings are in config.yaml of the run's folder."),
        ],
        footer=attribution([run.experiment]),
    )


def _fact(
    label: str, figure: dict[str, float] | float | None, form: str, missing: str = "not measured"
) -> Fact:
    if figure is None:
        return Fact(label, numbers.DASH, missing)
    if isinstance(figure, float):
        return Fact(label, form.format(figure))
    interval = numbers.interval(figure["low"], figure["high"], form.format)
    return Fact(label, form.format(figure["value"]), interval)


STAGE = Stage(
    "reconstruction",
    version=2,
    inputs=depends_on("reconstruction"),
    make=make_reconstruction,
    needs=("documents", "image_tokenizer"),
    settings=recorded("reconstruction"),
    results=(FIGURES,),
)
