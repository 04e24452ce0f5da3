"""A continuous Hopfield network learns digit images, by five gradient methods.

The network of Liao et al. 2018, section 5.1: visible units clamped to an image, hidden
units, and output units that learn to show the image; symmetric weights without
self-loops, logistic units,

    h ← free ⊙ W σ(h/2) + clamp,    loss = mean |output - image|,

50 updates from h = clamp, Adam, one image a step. All methods start from the same
weights, see the images in the same order and run the same 50 updates forward; they
differ in the gradient alone. What the original code never measured is measured here:
the retrieval error, which is the fraction of wrong pixels in the thresholded output
against the *clean* image when half of the on-pixels of the input are removed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, ClassVar

import numpy as np

from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.options import (
    Count,
    Dataset,
    OneOf,
    Positive,
    Seeds,
    Within,
    require,
)
from benchmarks.harness.progress import say
from benchmarks.harness.results import read_json, record, write_json
from benchmarks.harness.tables import table
from benchmarks.hopfield.costs import costs, sweep
from benchmarks.hopfield.images import corrupt, load_images, pack
from benchmarks.hopfield.learning import METHODS, learn
from benchmarks.hopfield.network import Network
from benchmarks.hopfield.report import draw, rows

PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "dataset": "digits",
        "hidden": 128,
        "epochs": 500,
        "learning_rate": 3e-3,
        "seeds": (0, 1, 2),
    },
    "paper": {
        "dataset": "mnist",
        "hidden": 1024,
        "epochs": 100,
        "learning_rate": 1e-3,
        "seeds": (0,),
    },
}

DRAWS = 20  # corruptions of each image for the retrieval error


@dataclasses.dataclass(frozen=True)
class Hopfield:
    """Train an associative memory of digit images by five gradient methods."""

    name: ClassVar[str] = "hopfield"

    preset: Annotated[str, OneOf(PRESETS)] = "small"
    """small: 8×8 digits, no download; paper: MNIST and 784 + 1024 + 784 units."""
    dataset: Dataset | None = None
    """digits (bundled with scikit-learn) or mnist (downloaded, or in RBPJAX_DATA)."""
    methods: Annotated[tuple[str, ...], OneOf(METHODS)] = tuple(METHODS)
    """Any of bptt, tbptt, rbp, cg, neumann."""
    hidden: Count | None = None
    """Number of hidden units."""
    num_images: Annotated[int, Within(1, 10)] = 10
    """How many of the ten classes' first images to store."""
    num_steps: Count = 50
    """Updates of the network for one image."""
    truncation: Count = 20
    """Steps of TBPTT, RBP and Neumann-RBP; the budget of CG-RBP."""
    epochs: Count | None = None
    """Passes over the images; each image is one Adam step."""
    learning_rate: Positive | None = None
    """Adam's step size."""
    seeds: Seeds | None = None
    """Seeds of weights and order; all run at once, by vmap."""
    sweep: bool = True
    """Also measure time and memory for truncations of 10 … 1000."""
    fresh: bool = False
    """Start over instead of resuming an interrupted run."""

    def run(self) -> dict[str, Any]:
        """Runs the experiment: JSON, figures, and a table on standard output."""
        options = resolve(self)
        images = load_images(options.dataset, options.num_images)
        network = Network(images.shape[1], options.hidden)
        kept = dataclasses.asdict(dataclasses.replace(options, fresh=False))
        checkpoints = Checkpoints("hopfield", kept, options.fresh)
        say(
            f"{len(images)} images of {options.dataset}, {network.units} units, "
            f"{options.num_steps} updates, truncation {options.truncation}, "
            f"{options.epochs * len(images)} Adam steps, seeds {list(options.seeds)}"
        )
        corrupted = corrupt(images, DRAWS)
        result = record(
            result_name(options),
            f"hopfield --preset {options.preset}",
            kept,
            image_side=math.isqrt(images.shape[1]),
            clean=pack(images),
            corrupted=pack(corrupted[0]),
            # What doing nothing would give: the corrupted against the clean image.
            input_error=float(np.mean(corrupted != images)),
            methods={},
        )
        for name in options.methods:
            result["methods"][name] = learn(
                options, name, network, images, corrupted, checkpoints
            )
        for name, cost in costs(options, network, images).items():
            result["methods"][name].update(cost)
        if options.sweep:
            result["sweep"] = sweep(options, network, images)
        path = write_json(result["experiment"], result)
        checkpoints.clear()
        result = read_json(path.stem)  # the figures and the table show the file
        figures = draw(result)
        say(table(rows(result)))
        say(f"a corrupted image itself is wrong in {result['input_error']:.3g} of its")
        say("pixels. Written: " + ", ".join(p.name for p in (path, *figures)))
        return result


def resolve(options: Hopfield) -> Hopfield:
    """The options with the preset filled in; UsageError if two of them do not fit."""
    given = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
    options = dataclasses.replace(Hopfield(), **(PRESETS[options.preset] | given))
    require(
        options.truncation <= options.num_steps,
        f"--truncation: {options.truncation} is beyond the {options.num_steps} "
        "updates; lower --truncation or raise --num-steps",
    )
    return options


def result_name(options: Hopfield) -> str:
    """The name of the result file: a run with other options has another name."""
    default = resolve(Hopfield(preset=options.preset))
    same = dataclasses.replace(options, fresh=False) == default
    return f"hopfield-{options.preset}" + ("" if same else "-custom")
