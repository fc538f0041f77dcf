"""All settings, as frozen, keyword-only dataclasses that are validated when constructed.

A `Config` has five sections: model, data, augment, optim and train. Recipes are YAML files with the
same names, and the command-line options are `--section.key value`. The docstring under a field is
its help text. All sections are in one file because users read them together. The module imports
nothing heavy, so that `--help` is fast.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vitral.errors import UserError


class Shape(NamedTuple):
    """Dimensions of an encoder, as defined by a size preset."""

    dim: int
    depth: int
    num_heads: int
    num_kv_heads: int


PRESETS: dict[str, Shape] = {
    "ti": Shape(192, 12, 3, 1),
    "s": Shape(384, 12, 6, 2),
    "b": Shape(768, 12, 12, 4),
    "l": Shape(1024, 24, 16, 4),
    "h": Shape(1280, 32, 16, 4),
}

MAX_PATCHES = 256  # per side
Sampling = Literal["uniform", "balanced", "sqrt"]
BestBy = Literal["top1", "balanced", "f1", "loss", "map"]
Device = Literal["auto", "cpu", "cuda", "mps", "xpu"]
Engine = Literal["auto", "plain", "onednn", "bf16", "onnxruntime", "openvino"]
TABLES = (".yaml", ".yml", ".csv")  # suffixes of files with a weight for each class
Policy = Literal[
    "none",
    "autoaugment-imagenet",
    "autoaugment-cifar10",
    "randaugment",
    "trivialaugment",
    "3-augment",
]


class Seconds(float):
    """A duration in seconds, parsed from 600, 90s, 10m, 2h or 1h30m."""

    def __new__(cls, value: float | str) -> Seconds:
        """Raises ValueError if the text has another format."""
        found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d*)?)s?)?", str(value))
        if found is None:
            raise ValueError(value)
        hours, minutes, seconds = (float(part or 0) for part in found.groups())
        return super().__new__(cls, 3600 * hours + 60 * minutes + seconds)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_fraction(**values: float) -> None:
    for name, value in values.items():
        _check(0 <= value < 1, f"{name}: expected a number from 0 to 1 (exclusive), got {value}")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        _check(0 < value < math.inf, f"{name}: expected a number above 0, got {value}")


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        _check(0 <= value < math.inf, f"{name}: expected 0 or more, got {value}")


def _check_at_most(limit: int, **values: float) -> None:
    """Rejects implausibly large values before a model of that size is built."""
    for name, value in values.items():
        _check(value <= limit, f"{name}: expected at most {limit:,}, got {value:,}")


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The architecture. Dimensions that are None are taken from the size preset."""

    size: Literal["ti", "s", "b", "l", "h"] = "s"
    """Preset for dim, depth, num_heads and num_kv_heads."""
    dim: int | None = None
    """Width of the tokens."""
    depth: int | None = None
    """Number of encoder blocks."""
    num_heads: int | None = None
    """Number of query heads. The head size, dim / num_heads, must be a multiple of four."""
    num_kv_heads: int | None = None
    """Number of key/value heads, each shared by a group of query heads; equal to num_heads for
    standard multi-head attention."""
    mlp_ratio: float = 4.0
    """Ratio of the hidden width of the feed-forward network to dim."""
    patch_size: int = 16
    """Side length of the square patches, in pixels."""
    image_size: int = 224
    """Side length of the training images, in pixels. The trained model accepts any multiple of
    patch_size."""
    num_registers: int = 0
    """Number of register tokens, in addition to the CLS token (Darcet et al. 2023)."""
    cls_token: bool = True
    """Use a CLS token."""
    pooling: Literal["cls", "mean", "mean-norm"] = "cls"
    """Input of the head: the CLS token, the mean of the normalized patch tokens, or the normalized
    mean of the patch tokens."""
    activation: Literal["gelu-tanh", "gelu", "quick-gelu", "swiglu"] = "gelu-tanh"
    """Activation of the feed-forward network: GELU in its tanh or exact form, x sigmoid(1.702 x),
    or SwiGLU (Shazeer 2020). The custom kernels support only gelu-tanh."""
    positions: Literal["none", "learned"] = "none"
    """Learned absolute position embeddings, one vector per patch, resampled for other image
    sizes."""
    embed_norm: Literal["none", "patches", "tokens"] = "none"
    """RMSNorm of the patch embeddings, or of all tokens with a bias and centering, as in CLIP."""
    norm_bias: bool = False
    """Use a bias in the last norm, as many pretrained models do."""
    rope: Literal["axial", "mixed", "none"] = "axial"
    """Rotary position embedding: fixed frequencies along x and y, learned frequencies in mixed
    directions (Heo et al. 2024), or none."""
    rope_theta: float = 100.0
    """Base of the rotary frequencies, for positions in units of the patches of rope_grid."""
    rope_grid: float | None = None
    """Number of patches per side over which rotary positions are distributed, at every image size;
    if not set, the number of patches per side at image_size. Weights that are fine-tuned at a
    different image size keep their original grid."""
    rope_origin: float = 0.5
    """Origin of the rotary positions: patch i of n is at (i + 0.5) rope_grid / n - rope_origin."""
    qk_norm: bool = False
    """Apply RMSNorm to every query and key head (Dehghani et al. 2023)."""
    layer_scale: float = 0.0
    """Initial value of LayerScale in each branch (Touvron et al. 2021); 0 disables it."""
    qkv_bias: bool = True
    """Use a bias in the projection to queries, keys and values."""
    ffn_bias: bool = True
    """Use biases in the feed-forward network."""
    dropout: float = 0.0
    """Dropout probability after attention and after the feed-forward network."""
    stochastic_depth: float = 0.0
    """Fraction of the images that skip the branches of the last block, increasing linearly from 0
    at the first block (Huang et al. 2016). If a tenth or more of the images skip a branch, it is
    not computed for them (Oquab et al. 2023)."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass, to save memory at the cost of a third more
    computation."""
    kernels: Literal["auto", "plain"] = "auto"
    """auto: custom kernels on GPUs that support them, if a measurement at the start of training
    shows that they are faster, and oneDNN on a CPU if it is faster according to the machine
    profile. plain: only PyTorch's built-in kernels. Weights have the same names and shapes in both
    cases."""

    def __post_init__(self) -> None:
        dim, depth, num_heads, num_kv_heads = self.shape
        _check_positive(dim=dim, depth=depth, num_heads=num_heads, num_kv_heads=num_kv_heads)
        _check_positive(patch_size=self.patch_size, image_size=self.image_size)
        _check_positive(mlp_ratio=self.mlp_ratio, rope_theta=self.rope_theta)
        _check_at_most(1000, depth=depth, mlp_ratio=self.mlp_ratio)
        _check_at_most(1 << 16, dim=dim, num_registers=self.num_registers)
        _check_at_most(1 << 13, patch_size=self.patch_size, image_size=self.image_size)
        _check(
            round(dim * self.mlp_ratio) > 0,
            f"mlp_ratio: expected a hidden width of 1 or more, got {self.mlp_ratio} times {dim}",
        )
        _check_not_negative(num_registers=self.num_registers, layer_scale=self.layer_scale)
        _check_fraction(dropout=self.dropout, stochastic_depth=self.stochastic_depth)
        _check(
            num_heads % num_kv_heads == 0,
            f"num_heads: expected a multiple of num_kv_heads {num_kv_heads}, got {num_heads}; "
            "change one of the two",
        )
        _check(
            dim % num_heads == 0 and dim // num_heads % 4 == 0,
            f"dim: expected num_heads {num_heads} times a head size that is a multiple of four, "
            f"got {dim} (head size {dim / num_heads:g}); change dim or num_heads",
        )
        nearest = max(1, round(self.image_size / self.patch_size)) * self.patch_size
        _check(
            self.image_size % self.patch_size == 0,
            f"image_size: expected a multiple of patch_size {self.patch_size}, "
            f"got {self.image_size}; the nearest is {nearest}",
        )
        _check(
            self.image_size // self.patch_size <= MAX_PATCHES,
            f"image_size: expected at most {MAX_PATCHES} patches per side, got {self.image_size} "
            f"pixels in patches of {self.patch_size}",
        )
        if self.rope_grid is not None:
            _check_positive(rope_grid=self.rope_grid)
        _check(
            math.isfinite(self.rope_origin),
            f"rope_origin: expected a number, got {self.rope_origin}",
        )
        _check(
            self.cls_token or self.pooling != "cls",
            "pooling: expected mean or mean-norm without a CLS token, got cls",
        )

    @property
    def grid(self) -> float:
        """Patches per side for rotary positions: rope_grid if set, else those of image_size."""
        return self.rope_grid or self.image_size // self.patch_size

    @property
    def num_prefix(self) -> int:
        """Number of tokens before the patches: CLS and registers."""
        return self.cls_token + self.num_registers

    @property
    def shape(self) -> Shape:
        """dim, depth, num_heads and num_kv_heads; fields that are None have the preset's value."""
        own = (self.dim, self.depth, self.num_heads, self.num_kv_heads)
        preset = PRESETS[self.size]
        return Shape(*(p if o is None else o for o, p in zip(own, preset, strict=True)))


TABLE_COLUMNS = ("image_column", "label_column", "group_column", "split_column")
"""Settings that name the columns of a table of labels."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The dataset and how its images are read."""

    path: str = "digits"
    """A folder of images, archives or Parquet files, a table of labels (.csv, .tsv, .jsonl,
    .parquet), a pack, or a known dataset: digits, synthetic, cifar10, cifar100, imagenette."""
    image_column: str | None = None
    """Column with the images in Parquet files, or with their paths in a table. None uses one with a
    common name, such as image, file_name or path."""
    label_column: str | None = None
    """Column with the class of each image in Parquet files or a table. None uses one with a common
    name, such as label, class or target."""
    group_column: str | None = None
    """Column with the group of each image, such as a patient or a camera, if the data is a table.
    Groups are not divided when images are held out. None uses a column named group, group_id or
    patient_id, if there is one."""
    split_column: str | None = None
    """Column with the split of each image, train, val or test, if the data is a table. None uses a
    column named split or subset, if there is one."""
    val_fraction: float = 0.1
    """Fraction of each class to hold out for validation, chosen by seed, if the dataset has no
    validation split."""
    hold_out: bool = False
    """Hold out val_fraction of the training images even if there is a validation split, which is
    then not used. This is for choosing settings, so that the validation split is evaluated only
    once, after they are chosen."""
    task: Literal["auto", "single", "multi"] = "auto"
    """single: every image has one class. multi: an image has any number of classes, listed in one
    cell of a table, or in one column of 0 and 1 for each class. auto: multi if label_separator is
    set, if cells contain lists, or if a table without a label column has only such columns."""
    label_separator: str | None = None
    """Text between the labels of an image in one cell of a table, such as a semicolon, for several
    labels per image. A space stands for any whitespace."""
    sampling: Sampling = "uniform"
    """How often the images of each class occur in an epoch. uniform: every image once. balanced:
    every class equally often. sqrt: in proportion to the square root of the number of its images.
    The length of an epoch remains the number of training images; images of rare classes are
    repeated, each time with different augmentation. An image with several labels counts as an
    image of the rarest of them."""
    workers: int | None = None
    """Number of data loading processes; if not set, all cores but one, at most 16. With 0, the main
    process loads the data."""
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to decode JPEGs; auto measures both at the start of a run and uses the faster one."""
    fit: Literal["crop", "squash", "pad"] = "crop"
    """How images are made square. crop: use the central square. squash: squash the image to a
    square. pad: pad the entire image to a square with `mean`, ignoring eval_crop. In training,
    random resized crops are taken from the original, squashed or padded image, respectively."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation used to resize crops (always antialiased)."""
    eval_crop: float = 0.875
    """Side length of the central evaluation crop, as a fraction of the image's shorter side; with
    fit squash, of each side. Ignored with fit pad."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the red, green and blue channels for normalization, on a scale of 0 to 1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the red, green and blue channels for normalization, on a scale of 0 to
    1."""

    def __post_init__(self) -> None:
        _check(
            self.path != "", "path: expected a folder or the name of a known dataset, got nothing"
        )
        for name in TABLE_COLUMNS:
            _check(getattr(self, name) != "", f"{name}: expected the name of a column, got nothing")
        _check(self.label_separator != "", "label_separator: expected a separator, got nothing")
        _check(
            self.label_separator is None or self.task != "single",
            f"label_separator: expected none with task single, got {self.label_separator!r}",
        )
        _check(
            0 < self.val_fraction < 1,
            f"val_fraction: expected a fraction between 0 and 1, got {self.val_fraction}",
        )
        _check_not_negative(workers=self.workers or 0)
        _check(
            0 < self.eval_crop <= 1,
            f"eval_crop: expected a number above 0 and at most 1, got {self.eval_crop}",
        )
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        _check(finite, f"mean, std: expected numbers, got {self.mean} and {self.std}")
        _check(min(self.std) > 0, f"std: expected three numbers above 0, got {self.std}")

    @property
    def fill(self) -> tuple[int, int, int]:
        """Color around the images, from 0 to 255: the mean with fit pad, otherwise black."""
        if self.fit != "pad":
            return 0, 0, 0
        red, green, blue = (min(max(round(255 * value), 0), 255) for value in self.mean)
        return red, green, blue


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random augmentation of each sample, as a pure function of (seed, epoch, index)."""

    crop: Literal["none", "resized", "padded"] = "resized"
    """resized: random resized crop. none: the evaluation crop. padded: the evaluation crop, shifted
    by up to crop_padding."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Minimum and maximum area of a random resized crop, as a fraction of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Minimum and maximum aspect ratio (width over height) of a random resized crop."""
    crop_padding: int = 4
    """Maximum shift of a padded crop, in pixels of the model's input."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    rotation: float = 0.0
    """Random affine: maximum rotation in either direction, in degrees."""
    zoom: float = 0.0
    """Random affine: maximum change of scale in either direction, as a fraction."""
    shear: float = 0.0
    """Random affine: maximum shear along x in either direction, in degrees."""
    shift: float = 0.0
    """Random affine: maximum translation along x and y in either direction, in pixels of the
    model's input."""
    policy: Policy = "none"
    """AutoAugment (its ImageNet or CIFAR-10 policy), RandAugment, TrivialAugment or 3-Augment."""
    randaugment_ops: int = 2
    """Number of operations that RandAugment applies to an image."""
    randaugment_magnitude: int = 9
    """Magnitude of RandAugment's operations, from 0 to 30."""
    brightness: float = 0.0
    """Color jitter: maximum change of brightness in either direction, as a fraction."""
    contrast: float = 0.0
    """Color jitter: maximum change of contrast in either direction, as a fraction."""
    saturation: float = 0.0
    """Color jitter: maximum change of saturation in either direction, as a fraction."""
    hue: float = 0.0
    """Color jitter: maximum change of hue in either direction, as a fraction of the color wheel, at
    most 0.5."""
    erasing: float = 0.0
    """Probability of Random Erasing (Zhong et al. 2017)."""
    mixup: float = 0.0
    """Alpha of Mixup's Beta distribution (Zhang et al. 2017); 0 disables Mixup."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution (Yun et al. 2019); 0 disables CutMix. If Mixup is also
    enabled, each batch uses one of the two with equal probability."""
    mix_until: float = 1.0
    """Fraction of the steps after which Mixup and CutMix stop."""
    repeats: int = 1
    """Number of differently augmented copies of each image in a batch (Hoffer et al. 2020)."""

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            _check(
                0 < low <= high < math.inf,
                f"{name}: expected two increasing numbers above 0, got {low} {high}",
            )
        _check(self.crop_scale[1] <= 1, f"crop_scale: expected at most 1, got {self.crop_scale[1]}")
        for name in ("flip", "erasing", "mix_until"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"{name}: expected a fraction from 0 to 1, got {value}")
        for name in ("crop_padding", "rotation", "shift", "randaugment_ops", "mixup", "cutmix"):
            _check_not_negative(**{name: getattr(self, name)})
        for name in ("brightness", "contrast", "saturation"):
            _check_not_negative(**{name: getattr(self, name)})
        _check_fraction(zoom=self.zoom)
        _check(
            0 <= self.shear < 90,
            f"shear: expected degrees from 0 to 90 (exclusive), got {self.shear}",
        )
        _check(0 <= self.hue <= 0.5, f"hue: expected a fraction from 0 to 0.5, got {self.hue}")
        _check(
            0 <= self.randaugment_magnitude <= 30,
            f"randaugment_magnitude: expected 0 to 30, got {self.randaugment_magnitude}",
        )
        _check(self.repeats >= 1, f"repeats: expected 1 or more, got {self.repeats}")

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix is enabled."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def off(self) -> bool:
        """Whether all augmentation is disabled."""
        strengths = (
            self.flip, self.rotation, self.zoom, self.shear, self.shift, self.brightness,
            self.contrast, self.saturation, self.hue, self.erasing, self.mixup, self.cutmix,
        )  # fmt: skip
        return self.crop == self.policy == "none" and not any(strengths)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon (Jordan et al. 2024) for the matrices of the blocks and AdamW for all other
    parameters."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's moving averages of the gradient and of its square."""
    eps: float = 1e-8
    """Term added to AdamW's denominator."""
    weight_decay: float = 0.05
    """Decoupled weight decay, applied only to matrices."""
    warmup_epochs: float = 5.0
    """Number of epochs of linear warmup before the cosine schedule."""
    final_lr: float = 0.0
    """Learning rate at the end of the cosine schedule, as a fraction of the peak."""
    clip_norm: float = 1.0
    """Maximum global gradient norm; 0 disables clipping."""
    layer_decay: float = 1.0
    """Learning rate multiplier per block below the head, for fine-tuning (Clark et al. 2020)."""
    head_lr_factor: float = 1.0
    """Learning rate multiplier for the head, for fine-tuning."""

    def __post_init__(self) -> None:
        _check_positive(lr=self.lr, eps=self.eps, head_lr_factor=self.head_lr_factor)
        _check_not_negative(weight_decay=self.weight_decay, warmup_epochs=self.warmup_epochs)
        _check_not_negative(clip_norm=self.clip_norm)
        _check(
            all(0 <= beta < 1 for beta in self.betas),
            f"betas: expected two numbers from 0 to 1 (exclusive), got {self.betas}",
        )
        _check(
            0 <= self.final_lr <= 1,
            f"final_lr: expected a fraction from 0 to 1, got {self.final_lr}",
        )
        _check(
            0 < self.layer_decay <= 1,
            f"layer_decay: expected a number above 0 and at most 1, got {self.layer_decay}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training run."""

    out: str | None = None
    """Run directory; if not set, runs/<recipe>."""
    seed: int = 0
    """Seed of all random numbers."""
    time_budget: Seconds | None = None
    """Time limit of the run, such as 600, 90s, 10m or 1h30m. The run measures its speed at the
    start and chooses the number of epochs. Cannot be combined with epochs."""
    epochs: int = 90
    """Number of passes over the training images. With augment.repeats R, each pass contains one in
    R images, R times each."""
    batch_size: int = 1024
    """Number of images per optimizer step, over all processes and micro-batches."""
    micro_batch: int | None = None
    """Number of images per forward pass; if not set, the largest part of the batch that fits in the
    memory of a CUDA GPU, and 64 on other devices."""
    progressive: tuple[tuple[int, float], ...] = ()
    """Successive image sizes, each with its fraction of the steps; by default, model.image_size
    throughout."""
    loss: Literal["ce", "bce"] = "ce"
    """Soft-target cross-entropy, or binary cross-entropy over every class. For images with
    several labels, bce always replaces ce."""
    label_smoothing: float = 0.0
    """Fraction of the target that is distributed uniformly over the classes or, for images with
    several labels, over presence and absence of each class."""
    class_weights: str = "none"
    """Factor on the loss of an image by its class, scaled to a mean of 1 over the training images.
    balanced: one over the number of images of the class. effective: one over the effective number
    of images (Cui et al. 2019) with beta 0.999. Or a .yaml or .csv file with a weight for each
    class name. A soft target has the mean weight of its classes."""
    logit_adjustment: float = 0.0
    """Factor tau on the logarithm of the class frequencies that is added to the logits in the
    training loss (Menon et al. 2021); 1 trains for balanced accuracy, 0 disables it."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights; 0 disables it."""
    init: str | None = None
    """Weights to start from: a path, hf-hub:owner/name or timm:name. A recipe without a model uses
    the model of the weights. If the classes differ, the head is reinitialized."""
    trainable: int | Literal["all", "head"] = "all"
    """Parameters to train. all: every parameter. head: only the head, fitted to features that are
    computed once per image in each epoch; the first epoch uses no augmentation. N: the head, the
    last norm and the last N blocks."""
    probe_first: bool = False
    """Fit the head to frozen features before the first step (Kumar et al. 2022)."""
    device: Device = "auto"
    """Device to train on; auto uses a GPU if one is available. mps (Apple) and xpu (Intel) train in
    float32 with PyTorch's built-in kernels, in one process, and are untested on hardware."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 autocast or float32; auto uses bf16 on CUDA GPUs that support it."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Compile the model with torch.compile, which requires a C compiler; auto compiles on a CUDA
    GPU, and on a CPU if it saves more time than it takes, according to the machine profile."""
    deterministic: bool = False
    """Make resuming bit-identical on a GPU, at a cost in speed; on a CPU, resuming is always
    bit-identical."""
    reproducible: bool = False
    """Produce bit-identical weights with 1, 2, 4 or 8 processes; slower."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Parallelism over processes: a copy of the model in each (ddp), or parameters sharded over
    them (fsdp, FSDP2)."""
    threads: int | None = None
    """Number of CPU threads per training process; if not set, the fastest number according to the
    machine profile, at most one per core and at most 16, or one with train.reproducible."""
    eval_every: int = 1
    """Epochs between validations."""
    best_by: BestBy = "top1"
    """Validation metric that selects weights/best, and raw or EMA weights: accuracy, balanced
    accuracy, macro F1, the lowest loss, or, for images with several labels, the mean average
    precision (map), which then replaces top1."""
    patience: int = 0
    """Stop after this many consecutive validations without improvement of best_by; 0 trains to the
    last epoch. The learning rate schedule remains that of all epochs, so a small value stops a run
    before the learning rate has decreased."""
    log_every: int = 50
    """Steps between rows of the metrics log."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints; if not set, only checkpoint_minutes applies."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints."""
    timeout_minutes: float = 30.0
    """Minutes that a process waits for the other processes of the run before it fails."""
    profile: bool = False
    """Write a torch.profiler trace of ten steps."""

    def __post_init__(self) -> None:
        _check_not_negative(seed=self.seed)
        for name in ("out", "init"):
            _check(getattr(self, name) != "", f"{name}: expected a path, got nothing")
        if self.time_budget is not None:
            _check_positive(time_budget=self.time_budget)
        _check_positive(epochs=self.epochs, batch_size=self.batch_size, eval_every=self.eval_every)
        _check_positive(log_every=self.log_every, checkpoint_minutes=self.checkpoint_minutes)
        _check_positive(timeout_minutes=self.timeout_minutes)
        for name in ("micro_batch", "threads", "checkpoint_steps"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"{name}: expected a number above 0, got {value}")
        _check_fraction(label_smoothing=self.label_smoothing, ema_decay=self.ema_decay)
        _check_not_negative(logit_adjustment=self.logit_adjustment, patience=self.patience)
        _check(
            self.class_weights in ("none", "balanced", "effective")
            or self.class_weights.endswith(TABLES),
            "class_weights: expected none, balanced, effective, or a .yaml or .csv file, got "
            f"{self.class_weights!r}",
        )
        _check(
            self.loss == "ce" or not self.logit_adjustment,
            f"logit_adjustment: expected 0 with loss bce, got {self.logit_adjustment:g}",
        )
        self._check_frozen()
        total = sum(fraction for _, fraction in self.progressive)
        _check(
            not self.progressive or math.isclose(total, 1, abs_tol=1e-3),
            f"progressive: expected fractions of the steps that add up to 1, got {total:g}",
        )
        for image_size, fraction in self.progressive:
            _check(
                image_size > 0 and fraction > 0,
                f"progressive: expected image sizes and fractions above 0, got {image_size} and "
                f"{fraction:g}",
            )
        size, micro = self.batch_size, self.micro_batch
        _check(size % 2 == 0, f"batch_size: expected an even number, got {size}; use {size + 1}")
        _check(
            micro is None or micro % 2 == 0, f"micro_batch: expected an even number, got {micro}"
        )

    def _check_frozen(self) -> None:
        _check(
            not isinstance(self.trainable, int) or self.trainable > 0,
            f"trainable: expected all, head, or 1 or more blocks, got {self.trainable}",
        )
        what = "probe_first" if self.probe_first else f"trainable {self.trainable}"
        _check(
            self.init is not None or (self.trainable == "all" and not self.probe_first),
            f"init: expected pretrained weights with {what}, got None; add --init WEIGHTS",
        )
        head = self.trainable == "head"
        _check(
            not (head and self.ema_decay),
            f"ema_decay: expected 0 with trainable head, got {self.ema_decay}",
        )
        _check(
            not (head and self.patience),
            f"patience: expected 0 with trainable head, which is validated once, got "
            f"{self.patience}",
        )
        _check(
            not (head and self.progressive),
            "progressive: cannot be combined with trainable head; use model.image_size",
        )

    def rank(self, metrics: Mapping[str, float], prefix: str = "") -> float:
        """Returns a value that is larger for better weights, according to `best_by`.

        Args:
            metrics: results of a validation, such as a row of the log. -inf is returned if the
                metric is missing or NaN.
            prefix: prefix of the names, such as "val_".
        """
        value = metrics.get(prefix + self.best_by, math.nan)
        value = -value if self.best_by == "loss" else value
        return -math.inf if math.isnan(value) else value


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run, as in a recipe and in `config.yaml`."""

    model: ViTConfig = ViTConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        size, repeats = self.train.batch_size, self.augment.repeats
        _check(
            size % (2 * repeats) == 0,
            f"train.batch_size: expected a multiple of twice augment.repeats {repeats}, got {size}",
        )
        _check(
            self.optim.warmup_epochs < self.train.epochs or self.optim.warmup_epochs == 0,
            f"optim.warmup_epochs: expected fewer than train.epochs {self.train.epochs}, "
            f"got {self.optim.warmup_epochs:g}; change either, or use --optim.warmup-epochs 0",
        )
        self._check_imbalance()
        depth, trainable = self.model.shape.depth, self.train.trainable
        _check(
            not isinstance(trainable, int) or trainable <= depth,
            f"train.trainable: expected at most the model's {depth} blocks, got {trainable}",
        )
        _check(
            trainable != "head" or not self.augment.mixes,
            "augment.mixup, augment.cutmix: expected 0 with train.trainable head; "
            "the recipe probe has suitable settings",
        )
        patch = self.model.patch_size
        for image_size, _ in self.train.progressive:
            _check(
                image_size % patch == 0,
                f"train.progressive: expected multiples of model.patch_size {patch}, got "
                f"{image_size}",
            )

    def _check_imbalance(self) -> None:
        train, sampling = self.train, self.data.sampling
        used = {
            f"data.sampling {sampling}": sampling != "uniform",
            f"train.class_weights {train.class_weights}": train.class_weights
            in ("balanced", "effective"),
            f"train.logit_adjustment {train.logit_adjustment:g}": train.logit_adjustment > 0,
        }
        names = [name for name, found in used.items() if found]
        _check(
            len(names) < 2,
            "train: expected one correction for rare classes, because their effects add up, got "
            f"{' and '.join(names)}; use one of them",
        )

    def image_size_at(self, progress: float) -> int:
        """Side length of the training images, in pixels, after a fraction `progress` of steps."""
        elapsed = 0.0
        for image_size, fraction in self.train.progressive:
            elapsed += fraction
            if progress < elapsed:
                return image_size
        return self.train.progressive[-1][0] if self.train.progressive else self.model.image_size


# Settings that may change when a run resumes, because they do not affect the weight updates.
# The data may move: its fingerprint is compared instead of its path.
CHANGEABLE = frozenset(
    {
        "model.activation_checkpointing",
        "data.path",
        *(f"data.{name}" for name in (*TABLE_COLUMNS, "task", "label_separator")),
        "data.workers",
        "train.out",
        "train.parallel",
        "train.eval_every",
        "train.log_every",
        "train.checkpoint_steps",
        "train.checkpoint_minutes",
        "train.timeout_minutes",
        "train.profile",
    }
)


def flatten(settings: Any) -> dict[str, Any]:
    """Returns a dataclass as {"key": value}; keys of nested sections are "section.key"."""
    flat = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{field.name}.{key}": inner for key, inner in flatten(value).items()}
        else:
            flat[field.name] = value
    return flat
