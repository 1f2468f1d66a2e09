"""The judge's eyes: a small convolutional classifier of Fashion-MNIST, its file and the command that trains it.

    python -m kind_edge.training.classifier -o DIR --seed 0

writes `classifier.safetensors` (fp16) and `classifier.json` (accuracy of that very file, and how it came to be).
Generated images are judged by its 64 penultimate features and by its predictions; see `evaluate`.

Legend: B batch, K = 10 classes, F = 64 features.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from kind_edge.bounded import read_bytes, read_object
from kind_edge.errors import InputError
from kind_edge.model.checkpoint import write_file
from kind_edge.training.data import CLASS_NAMES, FashionMNIST, load_fashion_mnist

CLASSIFIER_FILE = "classifier.safetensors"
CLASSIFIER_RECORD = "classifier.json"
SCHEMA_VERSION = 1
FEATURES = 64

BATCH = 256
EPOCHS = 15
PEAK_LEARNING_RATE = 5e-3
WEIGHT_DECAY = 0.05
DROPOUT = 0.25
SHIFT_PIXELS = 2


def shipped_judge_folder() -> Path:
    """Where the shipped judge lies: beside the shipped Fashion-MNIST model, inside the package."""
    return Path(__file__).resolve().parents[1] / "models" / "fashion-mnist"


class Classifier(nn.Module):
    """Four convolutions, 315 thousand parameters, 11 million MACs per image."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(  # [B, 1, 28, 28]
            *_stage(1, 32, pool=True),  # [B, 32, 14, 14]
            *_stage(32, 64, pool=True),  # [B, 64, 7, 7]
            *_stage(64, 128, pool=False),  # [B, 128, 7, 7]
            *_stage(128, 128, pool=True),  # [B, 128, 3, 3]
            nn.Flatten(),
            nn.Dropout(DROPOUT),
        )
        self.penultimate = nn.Linear(128 * 3 * 3, FEATURES)
        self.head = nn.Linear(FEATURES, len(CLASS_NAMES))

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features, after the nonlinearity: [B, 1, 28, 28] in [-1, 1] -> [B, 64], none negative."""
        return functional.relu(self.penultimate(self.trunk(images)))

    def forward(self, images: Tensor) -> Tensor:
        """Class logits in the order of CLASS_NAMES: [B, 1, 28, 28] in [-1, 1] -> [B, 10]."""
        return self.head(self.features(images))


def _stage(inputs: int, outputs: int, pool: bool) -> list[nn.Module]:
    # Pooling comes before normalisation: a quarter of the work for the layers after it.
    pooling = [nn.MaxPool2d(2)] if pool else []
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        *pooling,
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def to_input(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Pixels uint8 [B, 28, 28] (0 is background) to the network's input, float32 [B, 1, 28, 28] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).unsqueeze(1).float().div_(127.5).sub_(1.0)


@torch.inference_mode()
def embed(network: Classifier, pixels: npt.NDArray[np.uint8], batch: int = 100) -> tuple[Tensor, Tensor]:
    """Features float32 [n, 64] and logits float32 [n, 10] of pixels uint8 [n, 28, 28]."""
    features = [network.features(to_input(pixels[start : start + batch])) for start in range(0, len(pixels), batch)]
    joined = torch.cat(features) if features else torch.empty(0, FEATURES)
    return joined, network.head(joined)


# --- training ---------------------------------------------------------------------------------------------------------


def train_classifier(
    data: FashionMNIST, seed: int = 0, epochs: int = EPOCHS, report: Callable[[str], None] | None = None
) -> Classifier:
    """Train from scratch on the 60,000 training images; the test images are not looked at.

    AdamW under a one-cycle schedule, cross entropy, random shifts of up to two pixels. No mirroring: shoes all point
    one way here. Layers run in bfloat16 and weights stay in float32. The same seed, machine, thread count and torch
    version give the same weights.
    """
    torch.manual_seed(seed)
    network = Classifier().to(memory_format=torch.channels_last).train()
    images, labels = torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels)
    steps_per_epoch = len(images) // BATCH
    optimiser = torch.optim.AdamW(network.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=PEAK_LEARNING_RATE, total_steps=epochs * steps_per_epoch, pct_start=0.2
    )
    for epoch in range(epochs):
        loss_sum = 0.0
        order = torch.randperm(len(images))[: steps_per_epoch * BATCH]
        for chosen in order.split(BATCH):
            pixels = _shifted(images[chosen]).unsqueeze(1).float() / 127.5 - 1.0
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(pixels.contiguous(memory_format=torch.channels_last))
            loss = functional.cross_entropy(logits.float(), labels[chosen])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            loss_sum += loss.item()
        if report:
            report(f"epoch {epoch + 1:2d} of {epochs}: training loss {loss_sum / steps_per_epoch:.4f}")
    return network.eval()


def _shifted(pixels: Tensor) -> Tensor:
    """Every image of uint8 [B, 28, 28] moved by its own -2..2 pixels along both axes, background coming in."""
    batch, side, _ = pixels.shape
    padded = functional.pad(pixels, (SHIFT_PIXELS,) * 4)  # [B, 32, 32]
    offsets = torch.randint(0, 2 * SHIFT_PIXELS + 1, (2, batch, 1))
    rows, columns = offsets + torch.arange(side)  # [B, 28] each
    return padded[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


# --- the file ---------------------------------------------------------------------------------------------------------


def save_classifier(
    network: Classifier, folder: Path, provenance: Mapping[str, Any], data: FashionMNIST
) -> dict[str, Any]:
    """Write the weights in fp16, read them back, measure the file's own test accuracy and record it beside them.

    Returns the record, which is also `classifier.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().half().contiguous() for name, tensor in _wanted_tensors(network).items()}
    content = safetensors.torch.save(weights)
    _, logits = embed(_from_bytes(content, str(folder / CLASSIFIER_FILE)), data.test_images)
    correct = logits.argmax(dim=1).numpy() == data.test_labels
    record = {
        "schema_version": SCHEMA_VERSION,
        "classes": list(CLASS_NAMES),
        "features": FEATURES,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "data_sha256": data.data_sha256,
        "test_images": len(data.test_labels),
        "test_accuracy": float(correct.mean()),
        "test_accuracy_per_class": {
            name: float(correct[data.test_labels == index].mean()) for index, name in enumerate(CLASS_NAMES)
        },
        "provenance": dict(provenance),
    }
    write_file(folder / CLASSIFIER_FILE, content)
    write_file(folder / CLASSIFIER_RECORD, (json.dumps(record, indent=2) + "\n").encode())
    return record


def load_classifier(folder: Path) -> tuple[Classifier, dict[str, Any]]:
    """The classifier in `folder`, ready to evaluate, and its record.

    Raises:
        InputError: a file is missing, the checksum differs from the record's, or a tensor is not what it should be.
    """
    path, record_path = folder / CLASSIFIER_FILE, folder / CLASSIFIER_RECORD
    try:
        content, record = read_bytes(path, 2**30), read_object(record_path)
        wanted = record["sha256"]
    except (InputError, KeyError, TypeError) as error:
        raise InputError(
            f"no usable classifier in {folder} ({error}); wanted {CLASSIFIER_FILE} and {CLASSIFIER_RECORD}; "
            f"make them with: python -m kind_edge.training.classifier -o {folder}"
        ) from error
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != wanted:
        raise InputError(
            f"{path} is corrupt: its sha256 is {sha256}, {record_path} says {wanted}; restore both files together"
        )
    return _from_bytes(content, str(path)), record


def _wanted_tensors(network: Classifier) -> dict[str, Tensor]:
    # Batch normalisation counts its batches for training alone.
    return {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("num_batches_tracked")}


def _from_bytes(content: bytes, path: str) -> Classifier:
    try:
        tensors = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file: {error}") from error
    network = Classifier()
    wanted = {name: tuple(tensor.shape) for name, tensor in _wanted_tensors(network).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InputError(f"{path}: {name}: file has {found.get(name)}, classifier wants {wanted.get(name)}")
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    # With channels last, convolutions on a CPU take half the time.
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def main(arguments: list[str] | None = None) -> None:
    """Train, save and report; progress goes to standard error, the record to standard output."""
    parser = argparse.ArgumentParser(prog="python -m kind_edge.training.classifier", description=main.__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--data", type=Path, help="folder with the four Fashion-MNIST files")
    chosen = parser.parse_args(arguments)
    data = load_fashion_mnist(chosen.data)
    start_s = time.perf_counter()
    network = train_classifier(data, chosen.seed, chosen.epochs, lambda line: print(line, file=sys.stderr, flush=True))
    provenance = {
        "command": f"python -m kind_edge.training.classifier -o DIR --seed {chosen.seed} --epochs {chosen.epochs}",
        "seed": chosen.seed,
        "epochs": chosen.epochs,
        "training_s": round(time.perf_counter() - start_s, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(save_classifier(network, chosen.output, provenance, data), indent=2))


if __name__ == "__main__":
    main()
