"""Protocols: fixed recipes by which students are trained and scored.

An accuracy means nothing without its recipe: the same images gain ten points and more from the recipe alone.
A protocol is therefore data, and every hyper-parameter in it is asserted by a test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from ddgen.errors import UserError

TINY_IMAGENET = "tinyimagenet"
CIFAR100 = "cifar100"

# RDED, validation/main.py: learning rates by family of network; all others (ConvNet, ResNet) take 1e-3.
_RDED_LEARNING_RATES = (
    ("efficientnet_b0", 2e-3),
    ("mobilenet_v2", 2.5e-3),
    ("vgg11", 5e-4),
    ("alexnet", 1e-4),
    ("vit_b_16", 1e-4),
    ("swin_v2_t", 1e-4),
)


@dataclass(frozen=True)
class Protocol:
    """One recipe.

    Attributes:
        name: Name in settings, tables and files.
        title: The recipe in one line, for reports.
        labels: "soft": the observer labels every mixed batch; "hard": the class index; "views": what the observer said
            of the dataset's stored views.
        norm: Normalisation layers of the student.
        optimizer: "adamw" or "sgd".
        learning_rate: Peak for networks that have none of their own in `learning_rates`.
        learning_rates: (network, peak) of networks that differ.
        weight_decay: Of the parameters that are decayed.
        decay_vectors: Whether 1-D parameters (norms, biases) are decayed too.
        betas: AdamW's.
        momentum: SGD's.
        schedule: "half_cosine": `0.5 lr (1 + cos(pi epoch / epochs / 2))`, which ends at half;
            "steps": times `step_factor` at each of `step_at`, fractions of the epochs.
        step_at: Numerators and denominators of the steps, so that 2/3 of 300 epochs is epoch 200.
        step_factor: What a step multiplies the learning rate with.
        temperature: Of the soft loss.
        cutmix_alpha: CutMix boxes are drawn by Beta(alpha, alpha), one box a batch, every batch.
        min_crop: Smallest area of the random resized crop; None is 1 / factor, the whole image for uncomposed ones.
        color_jitter: Strength of brightness, contrast and saturation jitter.
        lighting_std: Strength of the PCA lighting noise.
        test_resize: Whether test images are enlarged to `size // 7 * 8` and centre-cropped to `size`.
        epochs_by_ipc: (largest ipc, epochs), ascending; the last holds for everything above.
        batch_sizes: (smallest ipc, batch size), ascending.
    """

    name: str
    title: str
    labels: Literal["soft", "hard", "views"]
    norm: Literal["batch", "instance"]
    optimizer: Literal["adamw", "sgd"]
    learning_rate: float
    weight_decay: float
    schedule: Literal["half_cosine", "steps"]
    epochs_by_ipc: tuple[tuple[float, int], ...]
    batch_sizes: tuple[tuple[int, int], ...]
    learning_rates: tuple[tuple[str, float], ...] = ()
    decay_vectors: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.0
    step_at: tuple[tuple[int, int], ...] = ()
    step_factor: float = 1.0
    temperature: float = 1.0
    cutmix_alpha: float = 1.0
    min_crop: float | None = None
    color_jitter: float = 0.0
    lighting_std: float = 0.0
    test_resize: bool = False

    def epochs(self, ipc: int) -> int:
        """Returns how many epochs students train on `ipc` images per class."""
        return next(epochs for largest, epochs in self.epochs_by_ipc if ipc <= largest)

    def batch_size(self, ipc: int, num_classes: int, *, dataset: str, network: str) -> int:
        """Returns the images per step: never more than there are, and never fewer than one.

        RDED publishes ipc 1, 10 and 50; an ipc between them takes the batch size of the next smaller one.
        """
        size = [size for smallest, size in self.batch_sizes if ipc >= smallest][-1]
        if self.name in ("rded", "stored"):
            if _is_small_cifar100(dataset, network):
                size = 25
            elif dataset == TINY_IMAGENET:
                size = 100
            elif num_classes in (100, 1000):
                size *= 2
        return max(1, min(size, ipc * num_classes))

    def peak_learning_rate(self, *, dataset: str, network: str) -> float:
        """Returns the learning rate of the first epoch."""
        if self.name in ("rded", "stored") and _is_small_cifar100(dataset, network):
            return 2e-3
        own = dict(self.learning_rates)
        return own.get(network.removeprefix("torchvision:"), self.learning_rate)

    def learning_rate_at(self, epoch: int, epochs: int, peak: float) -> float:
        """Returns the learning rate of an epoch, counted from 0.

        Args:
            epoch: Which epoch.
            epochs: How many there are.
            peak: `peak_learning_rate` of the network.
        """
        if self.schedule == "half_cosine":
            return 0.5 * peak * (1.0 + math.cos(math.pi * epoch / epochs / 2))
        steps = sum(epoch >= top * epochs // bottom for top, bottom in self.step_at)
        return float(peak * self.step_factor**steps)

    def crop_scale(self, factor: int) -> tuple[float, float]:
        """Returns the range of areas of the random resized crop for images made of factor x factor patches."""
        return (1.0 / factor if self.min_crop is None else self.min_crop, 1.0)

    def augmentation(self, factor: int, flip: bool) -> dict[str, Any]:
        """Returns everything that decides how images are augmented and mixed, as JSON."""
        return {
            "factor": factor,
            "flip": flip,
            "crop_scale": list(self.crop_scale(factor)),
            "color_jitter": self.color_jitter,
            "lighting_std": self.lighting_std,
            "cutmix_alpha": self.cutmix_alpha,
        }


def _is_small_cifar100(dataset: str, network: str) -> bool:
    return dataset == CIFAR100 and network == "convnet3"


# Sun et al., "On the Diversity and Realism of Distilled Dataset", CVPR 2024, and its published settings. Of its
# code's defects none is here: mixing leaves the batch alone and a step runs the student once, so batch-norm
# statistics are updated once; the score is the last epoch's; log-softmax is never the log of a softmax.
RDED = Protocol(
    name="rded",
    title="soft labels by the observer on every mixed batch (RDED), KL at temperature 20, AdamW, CutMix",
    labels="soft",
    norm="batch",
    optimizer="adamw",
    learning_rate=1e-3,
    learning_rates=_RDED_LEARNING_RATES,
    weight_decay=0.01,
    decay_vectors=False,
    schedule="half_cosine",
    temperature=20.0,
    test_resize=True,
    epochs_by_ipc=((math.inf, 300),),
    batch_sizes=((1, 10), (10, 50), (50, 100)),
)

# Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization" (IDC), ICML 2022, as later used
# by Minimax, IGD, MGD3 and CaO2: its base augmentation (crop, flip, jitter, lighting) and CutMix.
HARD = Protocol(
    name="hard",
    title="hard labels (IDC), cross-entropy, SGD, CutMix",
    labels="hard",
    norm="instance",
    optimizer="sgd",
    learning_rate=0.01,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="steps",
    step_at=((2, 3), (5, 6)),
    step_factor=0.2,
    min_crop=0.5,
    color_jitter=0.4,
    lighting_std=0.1,
    epochs_by_ipc=((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500), (math.inf, 300)),
    batch_sizes=((1, 64),),
)

# Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022: RDED's recipe on views
# that were labelled beforehand. The temperature is the stored one.
STORED = replace(
    RDED,
    name="stored",
    title="soft labels of stored views (FKD), no observer, otherwise as rded",
    labels="views",
)


def get_protocol(name: str) -> Protocol:
    """Returns the protocol of a name.

    Raises:
        UserError: There is none.
    """
    known = {protocol.name: protocol for protocol in (RDED, HARD, STORED)}
    if name not in known:
        raise UserError(f"--protocols {name}: unknown; choose among {', '.join(known)}")
    return known[name]
