"""Accuracy of any callable from a batch of images to logits, so that torch and ONNX Runtime are measured alike."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

Predict = Callable[[Tensor], Tensor]


@torch.no_grad()
def accuracy(
    predict: Predict, batches: Iterable[tuple[Tensor, Tensor]], classes: int
) -> float:
    """Top-1 accuracy in [0, 1] over (images N_3_H_W float32, labels N int64). Raises ValueError without any image."""
    metric, seen = MulticlassAccuracy(classes, average="micro"), 0
    for images, labels in batches:
        metric.update(predict(images).cpu(), labels.cpu())
        seen += len(labels)
    if not seen:
        raise ValueError("accuracy: no images to evaluate on")
    return float(metric.compute())


@torch.no_grad()
def mean_loss(predict: Predict, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean cross entropy over (images N_3_H_W float32, labels N int64)."""
    total = 0.0
    count = 0
    for images, labels in batches:
        logits = predict(images)
        losses = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
        total += float(losses)
        count += len(labels)
    return total / count


@torch.no_grad()
def predictions(
    predict: Predict, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """(predicted classes, labels), int64 N each, in the loader's order."""
    predicted = []
    expected = []
    for images, labels in batches:
        predicted.append(predict(images).argmax(1).cpu())
        expected.append(labels.cpu())
    return torch.cat(predicted), torch.cat(expected)


def predictor(model: nn.Module, device: torch.device) -> Predict:
    """`model` as a Predict: in eval mode on `device` while it is called, then back as it was."""

    def predict(images: Tensor) -> Tensor:
        training = model.training
        model.eval()
        try:
            return model(images.to(device, non_blocking=True))
        finally:
            model.train(training)

    return predict
