"""Protocols: fixed recipes by which students are trained and scored.

An accuracy means nothing without its recipe: the same images gain ten points and more from the recipe alone.
A protocol is therefore data, and every hyper-parameter in it is asserted by a test. A YAML file can state one in full
(`ddgen.evaluation.protocol_files`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

PLAIN = "-plain"

DsaOperation = Literal["color", "crop", "cutout", "flip", "scale", "rotate"]


@dataclass(frozen=True)
class Special:
    """What a recipe does otherwise for some data or network; what is None does not matter, or does not change.

    Attributes:
        dataset: Only on this dataset.
        network: Only for this student.
        num_classes: Only with one of these numbers of classes.
        batch_size: Images per step.
        batch_factor: Times as many images per step.
        learning_rate: Peak.
        epochs: Epochs.
    """

    dataset: str | None = None
    network: str | None = None
    num_classes: tuple[int, ...] | None = None
    batch_size: int | None = None
    batch_factor: int | None = None
    learning_rate: float | None = None
    epochs: int | None = None

    def holds(self, dataset: str, network: str, num_classes: int | None) -> bool:
        """Whether it is about this case."""
        return (
            self.dataset in (None, dataset)
            and self.network in (None, network)
            and (self.num_classes is None or num_classes in self.num_classes)
        )


@dataclass(frozen=True)
class Protocol:
    """One recipe.

    Attributes:
        name: Name in settings, tables and files.
        title: The recipe in one line, for reports.
        source: Where it comes from.
        labels: "soft": the observer labels every mixed batch; "stored": every image has one soft label, made once;
            "views": what the observer said of the dataset's stored views; "hard": the class index.
        norm: What students normalise with, where they have batch norm otherwise.
        optimizer: "adamw" or "sgd".
        learning_rate: Peak for networks that have none of their own in `learning_rates`.
        weight_decay: Of the parameters that are decayed.
        schedule: "half_cosine": `0.5 lr (1 + cos(pi epoch / epochs / 2))`, which ends at half;
            "steps": times `step_factor` at each of `step_at`.
        epochs_by_ipc: (largest ipc, epochs), ascending; the last holds for everything above.
        batch_sizes: (smallest ipc, batch size), ascending.
        student: The network that the recipe prescribes; None leaves it open.
        learning_rates: (network, peak) of networks that differ.
        specials: What differs by case; of those that hold, the first that states a value gives it.
        decay_vectors: Whether 1-D parameters (norms, biases) are decayed too.
        betas: AdamW's.
        momentum: SGD's.
        step_at: Numerators and denominators of the steps, so that 2/3 of 300 epochs is epoch 200, counted from 0.
        step_factor: What a step multiplies the learning rate with.
        fresh_optimizer: Whether a step also forgets the optimizer's state.
        loss: Of soft labels: "kl" of the tempered distributions, or "mse" of the logits.
        temperature: Of "kl".
        hard_weight: Weight of the cross-entropy with the class indices that is added to a soft loss.
        ensemble: Whether all observers label together, by the mean of their logits.
        ema_decay: Per step, of the average of the weights that is scored; 0 scores the weights themselves.
        cutmix_alpha: CutMix boxes are drawn by Beta(alpha, alpha), one box a batch, every batch; 0 for none.
        min_crop: Smallest area of the random resized crop; None is 1 / factor, the whole image for uncomposed ones.
        shuffle: Whether the patches of composed images are shuffled.
        flip: Whether images are mirrored at random.
        color_jitter: Strength of brightness, contrast and saturation jitter.
        lighting_std: Strength of the PCA lighting noise.
        dsa: Operations of DSA, of which one is drawn a batch.
        normalization: By the mean and standard deviation of "imagenet", or of the "dataset".
        test_resize: Whether test images are enlarged to `size // 7 * 8` and centre-cropped to `size`.
        any_number: Whether classes may have different numbers of images.
    """

    name: str
    title: str
    source: str
    labels: Literal["soft", "stored", "views", "hard"]
    norm: Literal["batch", "instance", "none"]
    optimizer: Literal["adamw", "sgd"]
    learning_rate: float
    weight_decay: float
    schedule: Literal["half_cosine", "steps"]
    epochs_by_ipc: tuple[tuple[float, int], ...]
    batch_sizes: tuple[tuple[int, int], ...]
    student: str | None = None
    learning_rates: tuple[tuple[str, float], ...] = ()
    specials: tuple[Special, ...] = ()
    decay_vectors: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.0
    step_at: tuple[tuple[int, int], ...] = ()
    step_factor: float = 1.0
    fresh_optimizer: bool = False
    loss: Literal["kl", "mse"] = "kl"
    temperature: float = 1.0
    hard_weight: float = 0.0
    ensemble: bool = False
    ema_decay: float = 0.0
    cutmix_alpha: float = 1.0
    min_crop: float | None = None
    shuffle: bool = True
    flip: bool = True
    color_jitter: float = 0.0
    lighting_std: float = 0.0
    dsa: tuple[DsaOperation, ...] = ()
    normalization: Literal["imagenet", "dataset"] = "imagenet"
    test_resize: bool = False
    any_number: bool = False

    def epochs(self, ipc: int, *, dataset: str, network: str) -> int:
        """Returns how many epochs students train on `ipc` images per class."""
        own = next((s.epochs for s in self.specials if s.epochs and s.holds(dataset, network, None)), None)
        return own or next(epochs for largest, epochs in self.epochs_by_ipc if ipc <= largest)

    def batch_size(self, ipc: int, num_classes: int, *, dataset: str, network: str) -> int:
        """Returns the images per step: never more than there are, and never fewer than one.

        An ipc between those listed takes the batch size of the next smaller one.
        """
        size = [size for smallest, size in self.batch_sizes if ipc >= smallest][-1]
        for special in self.specials:
            if special.holds(dataset, network, num_classes) and (special.batch_size or special.batch_factor):
                size = special.batch_size or size * (special.batch_factor or 1)
                break
        return max(1, min(size, ipc * num_classes))

    def peak_learning_rate(self, *, dataset: str, network: str) -> float:
        """Returns the learning rate of the first epoch."""
        for special in self.specials:
            if special.learning_rate and special.num_classes is None and special.holds(dataset, network, None):
                return special.learning_rate
        return dict(self.learning_rates).get(network.removeprefix("torchvision:"), self.learning_rate)

    def times_learning_rate(self, factor: float) -> Protocol:
        """Returns the recipe with every learning rate multiplied; itself for 1."""
        if factor == 1:
            return self
        return replace(
            self,
            learning_rate=factor * self.learning_rate,
            learning_rates=tuple((network, factor * rate) for network, rate in self.learning_rates),
            specials=tuple(
                replace(special, learning_rate=special.learning_rate and factor * special.learning_rate)
                for special in self.specials
            ),
        )

    def learning_rate_at(self, epoch: int, epochs: int, peak: float) -> float:
        """Returns the learning rate of an epoch, counted from 0.

        Args:
            epoch: Which epoch.
            epochs: How many there are.
            peak: `peak_learning_rate` of the network.
        """
        if self.schedule == "half_cosine":
            return 0.5 * peak * (1.0 + math.cos(math.pi * epoch / epochs / 2))
        return float(peak * self.step_factor ** self.steps_before(epoch, epochs))

    def steps_before(self, epoch: int, epochs: int) -> int:
        """Returns how many steps of the learning rate were taken before an epoch, counted from 0."""
        return sum(epoch >= top * epochs // bottom for top, bottom in self.step_at)

    def crop_scale(self, factor: int) -> tuple[float, float]:
        """Returns the range of areas of the random resized crop for images made of factor x factor patches."""
        return (1.0 / factor if self.min_crop is None else self.min_crop, 1.0)

    def augmentation(self, factor: int, flip: bool) -> dict[str, Any]:
        """Returns everything that decides how images are augmented and mixed, as JSON.

        Args:
            factor: Images are grids of factor x factor patches.
            flip: Whether a mirrored image is still of its class.
        """
        return {
            "factor": factor,
            "flip": flip and self.flip,
            "crop_scale": list(self.crop_scale(factor)),
            "color_jitter": self.color_jitter,
            "lighting_std": self.lighting_std,
            "dsa": [operation for operation in self.dsa if flip or operation != "flip"],
            "cutmix_alpha": self.cutmix_alpha,
        }

    def without_augmentation(self) -> Protocol:
        """Returns the same recipe on the images as they are: what the augmentation-robust score compares with."""
        return replace(
            self,
            name=self.name + PLAIN,
            title=f"{self.title}; without any augmentation",
            cutmix_alpha=0.0,
            min_crop=1.0,
            shuffle=False,
            flip=False,
            color_jitter=0.0,
            lighting_std=0.0,
            dsa=(),
        )


# RDED, validation/main.py: learning rates by family of network; all others (ConvNet, ResNet) take 1e-3. The two small
# transformers, which RDED does not have, take what it gives the large ones.
_RDED_LEARNING_RATES = (
    ("efficientnet_b0", 2e-3),
    ("mobilenet_v2", 2.5e-3),
    ("vgg11", 5e-4),
    ("alexnet", 1e-4),
    ("vit_b_16", 1e-4),
    ("swin_v2_t", 1e-4),
    ("vit", 1e-4),
    ("swin", 1e-4),
)
_DSA: tuple[DsaOperation, ...] = ("color", "crop", "cutout", "flip", "scale", "rotate")

# Sun et al., "On the Diversity and Realism of Distilled Dataset", CVPR 2024, and its published settings. Of its
# code's defects none is here: mixing leaves the batch alone and a step runs the student once, so batch-norm
# statistics are updated once; the score is the last epoch's; log-softmax is never the log of a softmax.
RDED = Protocol(
    name="rded",
    title="soft labels by the observer on every mixed batch (RDED), KL at temperature 20, AdamW, CutMix",
    source="Sun et al., On the Diversity and Realism of Distilled Dataset, CVPR 2024",
    labels="soft",
    norm="batch",
    optimizer="adamw",
    learning_rate=1e-3,
    learning_rates=_RDED_LEARNING_RATES,
    specials=(
        Special(dataset="cifar100", network="convnet3", batch_size=25, learning_rate=2e-3),
        Special(dataset="tinyimagenet", num_classes=(200,), batch_size=100),  # ten classes would get a step an epoch
        Special(num_classes=(100, 1000), batch_factor=2),
    ),
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
    source="Kim et al., Dataset Condensation via Efficient Synthetic-Data Parameterization, ICML 2022",
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

# The First Dataset Distillation Challenge, ECCV 2024, and its scorer. It trains epochs 0 to 1000 and lowers the rate,
# with a new optimizer, after epoch 501. At 64 px the student is still three blocks deep.
ECCV2024_TRACK1 = Protocol(
    name="eccv2024-track1",
    title="hard labels (ECCV 2024 challenge, 10 images a class), cross-entropy, SGD, DSA; 3 students asked for",
    source="The First Dataset Distillation Challenge, ECCV 2024, track 1",
    labels="hard",
    student="convnet3",
    norm="instance",
    optimizer="sgd",
    learning_rate=0.01,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="steps",
    step_at=((502, 1001),),
    step_factor=0.1,
    fresh_optimizer=True,
    cutmix_alpha=0.0,
    min_crop=1.0,
    shuffle=False,
    flip=False,  # mirroring is one of DSA's operations
    dsa=_DSA,
    normalization="dataset",
    epochs_by_ipc=((math.inf, 1001),),
    batch_sizes=((1, 256),),
)

# The same, on what a generator emits in 600 seconds; three rounds, each generated anew.
ECCV2024_TRACK2 = replace(
    ECCV2024_TRACK1,
    name="eccv2024-track2",
    title="hard labels (ECCV 2024 challenge, 600 s of a generator), cross-entropy, SGD, DSA; 3 rounds asked for",
    source="The First Dataset Distillation Challenge, ECCV 2024, track 2",
    step_at=((52, 101),),
    epochs_by_ipc=((math.inf, 101),),
    any_number=True,
)

# Shao et al., "Elucidating the Design Space of Dataset Condensation" (EDC), NeurIPS 2024: loss, optimizer, smoothed
# rate (its cosine with zeta = 2) and average of the weights. It varies the rest by dataset; decided here: 300 epochs as
# on ImageNet-1K (its CIFAR students take 1000); batches of 10 at ipc 1 and of 50 above, doubled from 200 classes on, as
# on CIFAR-10, CIFAR-100 and Tiny ImageNet; crops of half the area and more; the added cross-entropy is CutMix's, of
# both labels, where its code takes the first alone.
STRONG = Protocol(
    name="strong",
    title="soft labels by all observers on every mixed batch (EDC), MSE + 0.025 cross-entropy, AdamW, weight EMA 0.99",
    source="Shao et al., Elucidating the Design Space of Dataset Condensation, NeurIPS 2024",
    labels="soft",
    norm="batch",
    optimizer="adamw",
    learning_rate=1e-3,
    learning_rates=_RDED_LEARNING_RATES,
    specials=(Special(num_classes=(200, 1000), batch_factor=2),),
    weight_decay=0.01,
    decay_vectors=False,
    schedule="half_cosine",
    loss="mse",
    hard_weight=0.025,
    ensemble=True,
    ema_decay=0.99,
    min_crop=0.5,
    normalization="dataset",
    epochs_by_ipc=((math.inf, 300),),
    batch_sizes=((1, 10), (10, 50)),
)

# Qin et al., "A Label is Worth a Thousand Images in Dataset Distillation", NeurIPS 2024, and its code; left out are the
# ZCA whitening of its CIFAR images and its best of several scorings.
FIXED_SOFT = Protocol(
    name="fixed-soft",
    title="one stored soft label an image (Qin et al.), cross-entropy, SGD, DSA",
    source="Qin et al., A Label is Worth a Thousand Images in Dataset Distillation, NeurIPS 2024",
    labels="stored",
    norm="instance",
    optimizer="sgd",
    learning_rate=0.01,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="steps",
    step_at=((1, 4), (2, 4), (3, 4)),
    step_factor=0.3,
    cutmix_alpha=0.0,
    flip=False,
    dsa=_DSA,
    normalization="dataset",
    specials=(Special(dataset="tinyimagenet", epochs=1000),),
    epochs_by_ipc=((math.inf, 3000),),
    batch_sizes=((1, 256),),
)

# RDED's recipe on views that were labelled beforehand. The temperature is the stored one.
STORED = replace(
    RDED,
    name="stored",
    title="soft labels of stored views (FKD), no observer, otherwise as rded",
    source="Shen and Xing, A Fast Knowledge Distillation Framework for Visual Recognition, ECCV 2022",
    labels="views",
)

PROTOCOLS = {p.name: p for p in (RDED, HARD, ECCV2024_TRACK1, ECCV2024_TRACK2, STRONG, FIXED_SOFT, STORED)}
