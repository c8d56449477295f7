"""The one door to timm: backbones by name, with weights from a file, from timm's hub, or fresh; its optimizers and gradient
clipping."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeqat.files import FileError, require_readable
from qat.surgery.binary_nets import ARCHITECTURES


@dataclass(frozen=True)
class DataConfig:
    """What the backbone's weights expect: square input side in pixels, per-channel mean and std of [0, 1] pixels."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def create_backbone(
    name: str,
    num_classes: int,
    *,
    weights: Path | None = None,
    pretrained: bool = False,
    **model_kwargs: Any,
) -> tuple[nn.Module, DataConfig]:
    """A timm classifier with `num_classes` outputs, and what its inputs look like.

    weights: a local checkpoint (safetensors or torch); its classifier is dropped when the class counts differ.
    pretrained: timm's own weights for the name, downloaded by timm.
    Raises ValueError for an unknown name (with the nearest ones), a file that does not fit, or both sources at once.
    """
    import timm

    if weights is not None and pretrained:
        raise ValueError(
            "--weights and --pretrained exclude each other: one file or timm's own weights"
        )
    _require_model(name)
    model = timm.create_model(
        name, pretrained=pretrained, num_classes=num_classes, **model_kwargs
    )
    if weights is not None:
        _load_weights(model, weights)
    config = timm.data.resolve_model_data_config(model)
    return model, DataConfig(
        config["input_size"][-1], tuple(config["mean"]), tuple(config["std"])
    )


def own_image_size(name: str) -> int:
    """Side in pixels of the images that timm's record of a model names. Raises ValueError for an unknown name."""
    import timm

    _require_model(name)
    if name in ARCHITECTURES:
        record = ARCHITECTURES[name]().pretrained_cfg
        return int(record["input_size"][-1])  # type: ignore[index]
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    return int(config.input_size[-1])


def _require_model(name: str) -> None:
    """Raises ValueError for a name that timm does not know, with the nearest ones."""
    import difflib

    import timm

    register_binary_nets()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"--backbone {name}: timm has no such model; nearest: {', '.join(near) or 'none'}"
        )


def register_binary_nets() -> None:
    """Make the nets of `qat/surgery/binary_nets.py` known to `timm.create_model`; doing it again changes nothing."""
    import timm
    from timm.models import register_model

    for name, architecture in ARCHITECTURES.items():
        if not timm.is_model(name):
            register_model(_entrypoint(name, architecture))


# What timm tells every entrypoint
TIMM_ONLY = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


def _entrypoint(
    name: str, architecture: Callable[..., nn.Module]
) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise ValueError(
                f"--pretrained: {name} has no weights to download; give a file with --weights"
            )
        own = {key: value for key, value in options.items() if key not in TIMM_ONLY}
        return architecture(**own)

    entrypoint.__name__ = name
    entrypoint.__module__ = architecture.__module__
    return entrypoint


def first_and_last(model: nn.Module) -> tuple[str, ...]:
    """Names of the stem convolution(s) and the classifier layer(s), from timm's own record of the model."""
    config = getattr(model, "default_cfg", None) or {}
    names = [*_as_tuple(config.get("first_conv")), *_as_tuple(config.get("classifier"))]
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            layers.append(name)
    if not names or not set(names).issubset(layers):
        return (layers[0], layers[-1])
    return tuple(dict.fromkeys(names))


def create_optimizer(
    name: str, groups: Sequence[Mapping[str, Any]], lr: float
) -> torch.optim.Optimizer:
    """Any optimizer of timm's factory over parameter groups, each with its own lr and weight decay where it has one.

    Raises ValueError for an unknown name, with the nearest ones.
    """
    import difflib

    from timm.optim import create_optimizer_v2, list_optimizers

    known = [str(entry) for entry in list_optimizers()]
    if name.removeprefix("lookahead_") not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise ValueError(
            f"--optimizer {name}: timm has no such optimizer; nearest: {', '.join(near) or 'none'}"
        )
    return create_optimizer_v2(
        [dict(group) for group in groups], opt=name, lr=lr, weight_decay=0.0
    )


def clip_gradients(
    parameters: Sequence[nn.Parameter],
    clipped: Sequence[nn.Parameter],
    limit: float | None,
    mode: str,
) -> Tensor:
    """Clip `.grad` of `clipped` in place ("norm", "value" or "agc"; limit None: not at all); returns the global norm of
    `parameters` before, a scalar. For AGC (arXiv 2102.06171) pass `clipped` without the classifier's parameters."""
    from timm.utils import dispatch_clip_grad

    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    if limit is not None:
        dispatch_clip_grad(clipped, limit, mode=mode)
    return norm


class Mixup:
    """Mixup of a whole batch (arXiv 1710.09412) with timm's targets, its draws following from `seed` and the step alone.

    x = l · x + (1 - l) · x reversed,  y = l · y + (1 - l) · y reversed,  l ~ Beta(alpha, alpha)
    """

    def __init__(self, alpha: float, classes: int, seed: int) -> None:
        self.alpha, self.classes, self.seed = alpha, classes, seed

    def __call__(
        self, images: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Images N_C_H_W and labels N -> mixed images and shares N_K of the classes."""
        from timm.data.mixup import mixup_target

        generator = np.random.default_rng((self.seed, step))
        share = float(generator.beta(self.alpha, self.alpha))
        mixed = images * share + images.flip(0) * (1 - share)
        return mixed, mixup_target(labels, self.classes, share)


def _as_tuple(value: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _load_weights(model: nn.Module, path: Path) -> None:
    from timm.models import load_state_dict

    try:
        require_readable(path)
    except FileError as error:
        raise ValueError(f"--weights {error}") from error
    try:
        # A pickle may run any code
        state = load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"--weights {path}: not a readable checkpoint ({error})"
        ) from error
    own = model.state_dict()
    fitting = {}
    for key, value in state.items():
        if key in own and value.shape == own[key].shape:
            fitting[key] = value
    missing = _missing(model, fitting)
    if missing:
        shown = ", ".join(missing[:4])
        if len(missing) > 4:
            shown += f" and {len(missing) - 4} more"
        raise ValueError(
            f"--weights {path}: does not fit the backbone; missing or of another shape: {shown}"
        )
    for key, value in fitting.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"--weights {path}: {key} holds values that are nan or infinite"
            )
    model.load_state_dict(fitting, strict=False)


def _missing(model: nn.Module, fitting: Mapping[str, Tensor]) -> list[str]:
    """What the model needs and `fitting` lacks, sorted; a classifier may differ."""
    config = getattr(model, "default_cfg", {})
    classifiers = tuple(f"{name}." for name in _as_tuple(config.get("classifier")))
    missing = []
    for key in model.state_dict():
        # Older checkpoints have none, nothing reads them
        is_counter = key.endswith("num_batches_tracked")
        if key in fitting or is_counter or key.startswith(classifiers):
            continue
        missing.append(key)
    return sorted(missing)
